"""The README's Python, run as it is written, block after block, as a reader would type it."""

import re
from importlib.util import find_spec
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
SHORTER = {"n_steps=128": "n_steps=2", "learn(100_000)": "learn(64)", "n_eval_episodes=20": "n_eval_episodes=1"}
"""What takes minutes, and what is run in its place."""


def test_its_python_runs() -> None:
    text, names = README.read_text(), {}
    for long, short in SHORTER.items():
        assert text.count(long) == 1
        text = text.replace(long, short)
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python") > 0
    for block in blocks:
        code = block[1]
        if "gymnasium.utils.play" in code or ("make_real" in code and not find_spec("vizdoom")):
            continue  # one walks by hand, in a window; the real game is not installed
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + code, README, "exec"), names)

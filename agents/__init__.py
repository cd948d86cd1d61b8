"""What lives in a world: policies and agents that see frames and return actions."""

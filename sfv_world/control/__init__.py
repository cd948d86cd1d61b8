"""Controls: any Gymnasium action space to control tokens for the deep flow."""

"""Exit codes of every command."""

OK = 0
BAD_INPUT = 2
TARGET_MISSED = 3
INTERRUPTED = 130
TERMINATED = 143

"""Exit codes of every command."""

OK = 0
FAILED = 1  # it cannot go on: loss not finite, not enough memory, disk full
BAD_INPUT = 2
TARGET_MISSED = 3
NOISY = 3  # `tfnas lut build --strict` and `tfnas lut check --strict`
INTERRUPTED = 130  # others that a signal stops end with 128 + its number, too: 143 when terminated

"""What ships with the wheel for testing: the suite that every mixer passes (`seqzoo check`)."""

from seqzoo.testing.mixer_suite import (
    PROMISES,
    STREAMS,
    Result,
    Subject,
    check_mixer,
    check_promise,
)

__all__ = ["PROMISES", "STREAMS", "Result", "Subject", "check_mixer", "check_promise"]

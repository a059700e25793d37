"""Where `write_whole` was; it is in `ada2ms.core.atomic`."""

from ada2ms.core.atomic import write_whole

__all__ = ["write_whole"]

"""One error for every framework that is not installed."""

from importlib.util import find_spec


def require(module: str, extra: str) -> None:
    """Raises an ImportError that names the extra to install, unless `module` can be imported.

    Args:
        module: a top-level module, such as "torch".
        extra: the extra of this package that installs it.
    """
    if find_spec(module) is None:
        raise ImportError(
            f"ada2ms.{extra} needs {module}, which is not installed: pip install 'ada2ms[{extra}]'", name=module
        )

"""One error for whatever is not installed."""

from collections.abc import Iterable
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


def require_all(what: str, modules: Iterable[str], extra: str) -> None:
    """Raises an ImportError that names all modules that are missing, and the extra to install.

    Args:
        what: what needs them, as the sentence begins with it.
        modules: top-level modules.
        extra: the extra of this package that installs them.
    """
    if absent := [module for module in modules if find_spec(module) is None]:
        raise ImportError(f"{what} needs {', '.join(absent)}: pip install 'ada2ms[{extra}]'", name=absent[0])

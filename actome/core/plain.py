"""Sites of any ``nn.Module`` by module path: ``module:layer3.0.conv1`` and ``module:layer3.0.conv1@in``."""

from __future__ import annotations

from torch import Tensor, nn

from .errors import SiteError, nearest
from .sites import MODULE_PREFIX, Site, SiteTable, expand
from .taps import HookPoint

_IMAGE = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def plain_dims(ndim: int, image: bool) -> tuple[str, ...]:
    """The dims of a plain module's tensor, told from how many it has.

    >>> plain_dims(2, False), plain_dims(3, False), plain_dims(4, True)
    (('batch', 'unit'), ('batch', 'pos', 'unit'), ('batch', 'channel', 'height', 'width'))
    """
    if ndim <= 1:
        return ("batch",)[:ndim]
    if ndim == 4 and image:
        return ("batch", "channel", "height", "width")
    return ("batch", *("pos" if i == 1 else f"pos{i}" for i in range(1, ndim - 1)), "unit")


def module_sites(root: nn.Module, pattern: str, known: dict[str, Site]) -> list[Site]:
    """The sites that a ``module:`` pattern selects; `*` stands for one part of a path.

    Args:
        known: sites made before, so that one place has one point however often it is asked for; updated.

    Raises:
        SiteError: no module matches.
    """
    found: list[Site] = []
    image = any(isinstance(module, _IMAGE) for module in root.modules())
    paths = [name for name, _ in root.named_modules()]
    table = SiteTable(Site(path, ()) for path in paths)
    for one in expand(pattern.removeprefix(MODULE_PREFIX)):
        path, _, side = one.partition("@")
        if side not in ("", "in", "out"):
            raise SiteError(f"{pattern!r}: a module has @in and @out, not @{side}")
        if path in ("", "*") and path == "*":
            hits = [p for p in paths if p]
        elif "*" in path:
            try:
                hits = [site.name for site in table.match(path)]
            except SiteError:
                hits = []
        else:
            hits = [path] if path in paths else []
        if not hits:
            raise SiteError(f"no module matches {path!r}{nearest(path, [p for p in paths if p])}")
        for hit in hits:
            name = f"{MODULE_PREFIX}{hit}{'@in' if side == 'in' else ''}"
            if name not in known:
                point = HookPoint(root.get_submodule(hit), "in" if side == "in" else "out")
                point.image = image
                known[name] = Site(name, (), (), None, True, point)
            found.append(known[name])
    return found


def module_dims(site: Site, x: Tensor) -> tuple[str, ...]:
    """The dims of what a plain module's site gave."""
    return plain_dims(x.ndim, getattr(site.address, "image", False))

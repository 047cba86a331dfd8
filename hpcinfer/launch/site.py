"""The site of a start: chosen by `--site` or HPCINFER_SITE, its variables set where the user has not set them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping

from hpcinfer.config.site import Site, load_site, nccl_environment

SITE_VARIABLE = "HPCINFER_SITE"
"""Name or path of the site file; ranks inherit it from the process that starts them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SiteVariables:
    """What a site and a user together make of the environment: what is recorded with a run."""

    site: str = ""
    """Name or path; "" where no site was chosen."""
    from_site: dict[str, str] = dataclasses.field(default_factory=dict)
    """Variables that have the site's value."""
    from_user: dict[str, str] = dataclasses.field(default_factory=dict)
    """The user's own values of variables that the site sets too, and of any NCCL_* variable. They win."""


def chosen_site(name: str, environ: Mapping[str, str]) -> tuple[str, Site | None]:
    """The site's name or path and what it says: `name` if given, else what HPCINFER_SITE says, else ("", None).

    Raises:
        ConfigError: there is no such site, or its file is wrong.
    """
    name = name or environ.get(SITE_VARIABLE, "")
    return (name, load_site(name)) if name else ("", None)


def site_variables(name: str, site: Site | None, environ: Mapping[str, str]) -> SiteVariables:
    """Which variables a site sets beside those of `environ`. Pure.

    A variable that already has the site's value counts as the site's: the process that started this one has set it.
    """
    wanted = {**site.environment.variables, **nccl_environment(site)} if site else {}
    from_user = {
        key: value for key, value in environ.items()
        if (key in wanted and value != wanted[key]) or (key.startswith("NCCL_") and key not in wanted)
    }  # fmt: skip
    return SiteVariables(
        site=name, from_site={key: value for key, value in wanted.items() if key not in from_user}, from_user=from_user
    )


def apply_site(name: str, environ: MutableMapping[str, str]) -> tuple[Site | None, SiteVariables]:
    """Choose the site and put its variables, and its name for ranks that this process starts, into `environ`.

    To be called before MPI and NCCL are loaded: they read their variables when they start.

    Args:
        name: what `--site` says, or "".
        environ: `os.environ`.
    """
    name, site = chosen_site(name, environ)
    variables = site_variables(name, site, environ)
    environ.update(variables.from_site)
    if name:
        environ[SITE_VARIABLE] = name
    return site, variables

"""Asking the Hugging Face hub once, briefly: is the repository there, at which commit, and is the hub reachable at all?

The hub's own clients retry for half a minute when there is no network; one short question first avoids that wait.
"""

from __future__ import annotations

from typing import Literal

from vsdbench.errors import ConfigError, EnvironmentProblemError

TIMEOUT_S = 5.0


class HubUnreachableError(EnvironmentProblemError):
    """The hub did not answer: no network, switched off, or in trouble itself."""


def commit_of(repo: str, *, kind: Literal["model", "dataset"], revision: str | None = None, fix: str) -> str:
    """Return the full commit hash that a revision of a hub repository stands for now.

    Args:
        repo: ``owner/name``.
        kind: What the repository holds.
        revision: Branch, tag or commit; the main branch if None.
        fix: What the user can do without the hub, as the end of a sentence.

    Raises:
        HubUnreachableError: No answer within a few seconds.
        ConfigError: No such repository or revision, or access to it must be asked for.
    """
    import huggingface_hub  # noqa: PLC0415 - slow to import, and only hub sources need it
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        info = huggingface_hub.HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=TIMEOUT_S)
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"the {kind} '{repo}' asks for permission: accept its terms on its hub page and run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"the hub has no public {kind} '{repo}': correct the id, or run `hf auth login` if it is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(
            f"the {kind} '{repo}' has no revision '{revision}' on the hub: correct or drop it."
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"'{repo}' is not a hub id of the form owner/name.") from error
    except Exception as error:  # the transport's errors differ between versions of the client
        cause = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise HubUnreachableError(
            f"the hub is not reachable for the {kind} '{repo}' ({cause}): check the network, or {fix}."
        ) from error
    if info.sha is None:
        raise HubUnreachableError(f"the hub gave no commit for the {kind} '{repo}': try again, or {fix}.")
    return info.sha

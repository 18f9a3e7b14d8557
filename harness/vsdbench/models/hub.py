"""The Hugging Face hub, asked briefly: is the repository there, at which commit, and is the hub reachable at all?

The hub's own clients retry for half a minute when there is no network; one short question first avoids that wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from vsdbench.errors import ConfigError, EnvironmentProblemError, VsdbenchError, is_disk_full

RepoKind = Literal["model", "dataset"]

TIMEOUT_S = 5.0


class HubUnreachableError(EnvironmentProblemError):
    """The hub did not answer: no network, switched off, or in trouble itself."""


@contextmanager
def hub_errors(repo: str, *, kind: RepoKind, revision: str | None, fix: str) -> Iterator[None]:
    """Turn whatever the hub's client raises inside into an error with one sentence.

    Args:
        repo: ``owner/name``.
        kind: What the repository holds.
        revision: What was asked for.
        fix: What the user can do without the hub, as the end of a sentence.

    Raises:
        HubUnreachableError: No answer.
        EnvironmentProblemError: The disk is full.
        ConfigError: No such repository or revision, or access to it must be asked for.
    """
    from huggingface_hub import errors  # noqa: PLC0415 - slow to import, and only hub sources need it

    try:
        yield
    except VsdbenchError:
        raise
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
        if is_disk_full(error):
            raise EnvironmentProblemError(
                f"the {kind} '{repo}' does not fit the disk: free some space or set HF_HOME to a folder elsewhere."
            ) from error
        lines = str(error).strip().splitlines()
        cause = lines[0].rstrip(".") if lines else type(error).__name__
        raise HubUnreachableError(
            f"the hub is not reachable for the {kind} '{repo}' ({cause}): check the network, or {fix}."
        ) from error


def commit_of(repo: str, *, kind: RepoKind, revision: str | None = None, fix: str) -> str:
    """Return the full commit hash that a revision (the main branch if None) of a repository stands for now.

    Raises:
        HubUnreachableError: No answer within a few seconds.
        ConfigError: As ``hub_errors``.
    """
    import huggingface_hub  # noqa: PLC0415

    with hub_errors(repo, kind=kind, revision=revision, fix=fix):
        info = huggingface_hub.HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=TIMEOUT_S)
        if info.sha is None:
            raise HubUnreachableError(f"the hub gave no commit for the {kind} '{repo}': try again, or {fix}.")
        return info.sha

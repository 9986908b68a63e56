"""`--push`: a pruned model on the Hugging Face hub.

check_push("OWNER/NAME")                     # before long work: is somebody logged in who may write there?
push(folder, "OWNER/NAME", "what was done")  # a new repository is private until its owner makes it public
"""

import contextlib
from collections.abc import Generator
from pathlib import Path

from farms_jax.errors import InputError, one_line


def check_push(name: str) -> None:
    """Ask the hub who is logged in; InputError where that is nobody, or one who may not write there."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    with _in_one_line(name, "without --push no hub is needed"):
        person = HfApi().whoami()
    if ((person.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise InputError(f"--push {name}: the token may only read; `hf auth login` with one that may write")
    owners = [person["name"], *(org["name"] for org in person.get("orgs", ()) if org.get("roleInOrg") != "read")]
    if name.partition("/")[0].lower() not in {owner.lower() for owner in owners}:
        raise InputError(f"--push {name}: {person['name']} may not write there; OWNER may be {', '.join(owners)}")


def push(folder: Path, name: str, message: str) -> str:
    """Upload a folder, and return the address of its repository; one that does not exist yet is made, private."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    with _in_one_line(name, f"the model is in {folder}; the same command pushes it without pruning again"):
        address = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return str(address)


@contextlib.contextmanager
def _in_one_line(name: str, otherwise: str) -> Generator[None]:
    """Turn any error of the hub into one line: what is wrong, what to do."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        fault, told = error, "nobody is logged in: `hf auth login`, or set HF_TOKEN"
    except errors.HFValidationError as error:
        fault, told = error, f"no name of a repository ({one_line(error)})"
    except errors.OfflineModeIsEnabled as error:
        fault, told = error, "HF_HUB_OFFLINE is set: unset it"
    except errors.HfHubHTTPError as error:
        known = {401: "the token is not valid: `hf auth login`", 403: "the token has no right to write there"}
        status = getattr(error.response, "status_code", 0)
        fault, told = error, known.get(status, f"refused by the hub ({one_line(error)})")
    except Exception as error:  # of several network libraries
        fault, told = error, f"the hub cannot be reached ({one_line(error)})"
    else:
        return
    raise InputError(f"--push {name}: {told}; {otherwise}") from fault

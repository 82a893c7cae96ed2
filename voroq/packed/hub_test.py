"""Where a model is: what is looked up on the hub, what is asked for, and what its refusals become."""

import pytest
from huggingface_hub import errors as hub

from voroq.errors import VoroqError
from voroq.packed import hub as module
from voroq.packed.hub import locate


@pytest.mark.parametrize("model", ["/no/such/folder", "./none", "~/none", "a/b/c", ""])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(model, monkeypatch):
    monkeypatch.setattr(module, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(VoroqError, match="no folder"):
        locate(model)


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    status_code, headers, request, text = 404, {}, None, ""


def hub_error(kind: type) -> Exception:
    return kind("said by the hub", response=Response()) if issubclass(kind, hub.HfHubHTTPError) else kind("said by the hub")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub.GatedRepoError, "gated"),
        (hub.RepositoryNotFoundError, "neither a folder nor a model on the hub"),
        (hub.RevisionNotFoundError, "said by the hub"),
        (hub.LocalEntryNotFoundError, "cannot be reached"),
        (hub.OfflineModeIsEnabled, "said by the hub"),
        (hub.HFValidationError, "valid hub id"),
        (ConnectionResetError, "said by the hub"),
        (RuntimeError, "said by the hub"),
    ],
)
def test_what_the_hub_says_becomes_one_line(error, message, monkeypatch):
    def fail(*_, **__):
        raise hub_error(error)

    monkeypatch.setattr(module, "snapshot_download", fail)
    with pytest.raises(VoroqError, match=message) as caught:
        locate("someone/something")
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_safetensors_only(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(module, "snapshot_download", lambda model, **options: asked.update(options, model=model) or str(tmp_path))
    locate("someone/something", revision="abc")
    assert asked["model"] == "someone/something"
    assert asked["revision"] == "abc"
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])
    locate("someone/something", trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"]

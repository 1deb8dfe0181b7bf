"""What a dispatcher's settings say of its own machine."""

from pathlib import Path

from workers.settings import WorkerSettings


def test_messages_for_users_do_not_tell_where_things_lie(tmp_path: Path) -> None:
    real = tmp_path / "real-models"
    real.mkdir()
    (tmp_path / "models").symlink_to(real)
    settings = WorkerSettings.model_construct(
        home=tmp_path / "home", model_roots=(tmp_path / "models",), text_roots=(), work_dir=None, model_cache=None
    )
    for place in (tmp_path / "models", real, tmp_path / "home" / "models"):
        assert (
            settings.told(f"layer 1: {place}/llama/model.safetensors: NaN") == "layer 1: llama/model.safetensors: NaN"
        )
    assert settings.told(f"{tmp_path}/home/work/job_1: gone") == "job_1: gone"
    assert settings.told("/etc/hosts is elsewhere") == "/etc/hosts is elsewhere"

"""What a dispatcher's settings say of its own machine."""

from pathlib import Path

from workers.settings import WorkerSettings


def test_messages_for_users_do_not_tell_where_things_lie(tmp_path: Path) -> None:
    real = tmp_path / "real-models"
    real.mkdir()
    (tmp_path / "models").symlink_to(real)
    settings = WorkerSettings.model_construct(
        home=tmp_path / "home",
        model_roots=(tmp_path / "models",),
        text_roots=(),
        work_dir=None,
        model_cache=None,
        database_url="",
        s3_endpoint=None,
    )
    for place in (tmp_path / "models", real, tmp_path / "home" / "models"):
        assert (
            settings.told(f"layer 1: {place}/llama/model.safetensors: NaN") == "layer 1: llama/model.safetensors: NaN"
        )
    assert settings.told(f"{tmp_path}/home/work/job_1: gone") == "job_1: gone"
    assert settings.told("/etc/hosts is elsewhere") == "/etc/hosts is elsewhere"


def test_messages_for_users_do_not_tell_which_servers_there_are(tmp_path: Path) -> None:
    settings = WorkerSettings.model_construct(
        home=tmp_path,
        model_roots=(),
        text_roots=(),
        work_dir=None,
        model_cache=None,
        database_url="postgresql+psycopg://duquant:secret@10.1.2.3:5432/duquant",
        s3_endpoint="http://127.0.0.1:51787",
    )
    said = "the object store at http://127.0.0.1:51787 does not answer: EndpointConnectionError"
    assert settings.told(said) == "the object store does not answer: EndpointConnectionError"
    url = "postgresql+psycopg://duquant:***@10.1.2.3:5432/duquant"
    cause = 'connection failed: connection to server at "db.lab" (10.1.2.3), port 5432 failed: refused'
    told = settings.told(f"the database {url} does not answer: {cause}")
    assert told == "the database does not answer: connection failed: connection to server failed: refused"

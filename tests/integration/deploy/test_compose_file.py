import re
import subprocess
import sys

import pytest
import yaml

OUR_IMAGES = ("duquant-api", "duquant-worker", "duquant-storage")


def test_compose_file_is_valid_against_the_official_schema(compose_file):
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(compose_file.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_schema_check_refuses_a_misspelt_key(compose_file, tmp_path):
    broken = {**compose_file.raw, "services": {"api": {"image": "x", "comand": ["y"]}}}
    path = tmp_path / "docker-compose.yml"
    path.write_text(yaml.safe_dump(broken))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 1


def test_make_env_fills_every_variable_that_has_no_default(compose_file, secrets):
    compose_file.services(secrets)


def test_every_secret_must_be_given(compose_file, secrets):
    for name in secrets:
        without = {key: value for key, value in secrets.items() if key != name}
        with pytest.raises(Exception, match=name):
            compose_file.services(without)


def test_no_secret_has_a_default(compose_file):
    text = compose_file.path.read_text()
    defaults = re.findall(r"\$\{(\w+):-", text)
    assert defaults
    assert not [name for name in defaults if re.search(r"PASSWORD|SECRET|TOKEN|PEPPER|KEY", name)]


def test_two_runs_of_make_env_share_no_secret(secrets):
    from infra.deploy.make_env import make_env

    other = make_env()
    assert [name for name in secrets if secrets[name] == other[name]] == ["DUQUANT_S3_PUBLIC_ENDPOINT"]


def test_make_env_prints_lines_that_compose_can_read(secrets):
    done = subprocess.run([sys.executable, "-m", "infra.deploy.make_env"], capture_output=True, text=True, check=True)
    lines = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert lines.keys() == secrets.keys()
    assert all(re.fullmatch(r"[A-Za-z0-9_:/.]+", value) for value in lines.values())


def test_every_service_is_unprivileged_and_bounded(compose_file, secrets):
    for name, service in compose_file.services(secrets).items():
        assert service["user"].split(":")[0] not in ("0", "root"), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["logging"]["options"]["max-size"], name


def test_every_lasting_service_has_a_health_check_and_is_restarted(compose_file, secrets):
    services = compose_file.services(secrets)
    lasting = {name: service for name, service in services.items() if name != "migrate"}
    assert all(service["healthcheck"]["test"][0] == "CMD" for service in lasting.values())
    assert all(service["restart"] == "unless-stopped" for service in lasting.values())
    assert services["migrate"]["restart"] == "no"


def test_published_ports_stay_on_this_machine_unless_told_otherwise(compose_file, secrets):
    ports = [port for service in compose_file.services(secrets).values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_ray_and_the_database_are_reachable_inside_only(compose_file, secrets):
    services = compose_file.services(secrets)
    internal = {name for name, network in compose_file.raw["networks"].items() if (network or {}).get("internal")}
    for name in ("postgres", "ray-head", "ray-worker"):
        assert set(services[name]["networks"]) <= internal, name
        assert "ports" not in services[name]


def test_images_are_pinned(compose_file, secrets):
    for name, service in compose_file.services(secrets).items():
        image, tag = service["image"].rsplit(":", 1)
        assert tag != "latest", name
        assert image == "postgres" or (image in OUR_IMAGES and "build" in service), name


@pytest.mark.parametrize("name", ["api", "worker", "storage"])
def test_dockerfiles_copy_what_exists_and_end_as_an_ordinary_user(compose_file, name):
    repository = compose_file.path.parent
    lines = (repository / "infra" / "deploy" / f"Dockerfile.{name}").read_text().splitlines()
    kept = {line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in lines:
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--"):
            for source in words[1:-1]:
                assert (repository / source).exists(), line
                assert source.split("/")[0] in kept, f"{source} is not in the build context"
    assert [line for line in lines if line.startswith("USER")] == ["USER 10001:10001"]


def test_the_api_image_installs_no_torch(compose_file):
    text = (compose_file.path.parent / "infra" / "deploy" / "Dockerfile.api").read_text()
    assert "'.[service,otel]'" in text
    assert "torch==" not in text

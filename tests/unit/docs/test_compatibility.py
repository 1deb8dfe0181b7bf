"""What counts as breaking a client."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def breaking_changes():
    spec = importlib.util.spec_from_file_location("docs_compatibility", REPOSITORY / "docs" / "compatibility.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.breaking_changes


@pytest.fixture
def described():
    return json.loads((REPOSITORY / "docs" / "reference" / "openapi.json").read_text())


def _schema(document, name):
    return document["components"]["schemas"][name]


def _operation(document, path="/v1/jobs", method="post"):
    return document["paths"][path][method]


def _remove_operation(new):
    del new["paths"]["/v1/jobs/{job_id}"]["get"]


def _rename_operation(new):
    _operation(new)["operationId"] = "createJob"


def _require_field(new):
    _schema(new, "JobRequest")["required"].append("priority")


def _remove_request_field(new):
    del _schema(new, "JobRequest")["properties"]["labels"]


def _tighten_bound(new):
    _schema(new, "JobRequest")["properties"]["priority"]["maximum"] = 10


def _narrow_type(new):
    _schema(new, "JobRequest")["properties"]["force"]["type"] = "string"


def _remove_enum_value(new):
    _schema(new, "ModelRequest")["properties"]["source"]["enum"].remove("hub")


def _remove_answer_field(new):
    del _schema(new, "JobDetail")["properties"]["state"]


def _make_answer_field_optional(new):
    _schema(new, "JobDetail")["required"].remove("state")


def _make_answer_field_nullable(new):
    state = _schema(new, "JobDetail")["properties"]["state"]
    state["anyOf"] = [{"type": state.pop("type")}, {"type": "null"}]


def _remove_status(new):
    del _operation(new)["responses"]["201"]


def _remove_header(new):
    del _operation(new, "/v1/jobs/{job_id}", "get")["responses"]["200"]["headers"]["ETag"]


def _require_parameter(new):
    next(each for each in _operation(new, method="get")["parameters"] if each["name"] == "limit")["required"] = True


def _remove_parameter(new):
    operation = _operation(new, method="get")
    operation["parameters"] = [each for each in operation["parameters"] if each["name"] != "cursor"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_remove_operation, "GET /v1/jobs/{job_id} is gone"),
        (_rename_operation, "operationId submitJob became createJob"),
        (_require_field, "body now requires the field priority"),
        (_remove_request_field, "body lost the field labels"),
        (_tighten_bound, "body.priority is now bounded by maximum 10"),
        (_narrow_type, "body.force was boolean and is string"),
        (_remove_enum_value, "body.model.source takes only"),
        (_remove_answer_field, "answer 200 lost the field state"),
        (_make_answer_field_optional, "answer 200 may now leave out the field state"),
        (_make_answer_field_nullable, "answer 200.state was string and is null or string"),
        (_remove_status, "answer 201 is gone"),
        (_remove_header, "answer 200 lost its header ETag"),
        (_require_parameter, "query parameter limit is now required"),
        (_remove_parameter, "query parameter cursor is gone"),
    ],
)
def test_a_change_that_clients_notice_is_named(breaking_changes, described, change, words):
    new = copy.deepcopy(described)
    change(new)
    assert any(words in found for found in breaking_changes(described, new)), breaking_changes(described, new)


def _add_operation(new):
    new["paths"]["/v1/new"] = {"get": {"operationId": "new", "responses": {"200": {}}}}


def _add_optional_field(new):
    _schema(new, "JobRequest")["properties"]["note"] = {"type": "string"}


def _add_answer_field(new):
    _schema(new, "JobDetail")["properties"]["note"] = {"type": "string"}
    _schema(new, "JobDetail")["required"].append("note")


def _widen(new):
    _schema(new, "JobRequest")["properties"]["priority"]["maximum"] = 2000
    _schema(new, "ModelRequest")["properties"]["source"]["enum"].append("s3")
    _operation(new)["responses"]["410"] = {"description": "new"}


@pytest.mark.parametrize("change", [_add_operation, _add_optional_field, _add_answer_field, _widen])
def test_additions_break_nobody(breaking_changes, described, change):
    new = copy.deepcopy(described)
    change(new)
    assert breaking_changes(described, new) == []

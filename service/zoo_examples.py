"""Examples of artifacts, evaluations and batches that the OpenAPI description shows."""

from typing import Any

from service.examples import JOB

_AT = "2026-01-05T09:40:00.000Z"
_ARTIFACT_ID = "art_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"
_METRICS: dict[str, Any] = {
    "perplexity": 24.81,
    "tokens": 32752,
    "windows": 16,
    "seq_len": 2048,
    "seconds": 41.3,
    "tokens_per_second": 793.0,
    "model_bytes": 132_000_000,
    "device": "cpu",
    "tasks": {
        "piqa": {
            "acc": 0.642,
            "acc_stderr": 0.0214,
            "acc_norm": 0.638,
            "acc_norm_stderr": 0.0215,
            "samples": 500,
            "num_fewshot": 0,
            "seconds": 71.9,
        }
    },
}

EVALUATION: dict[str, Any] = {
    "id": "eval_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b",
    "job_id": "job_0199a1b2c3d47e5f8a9b0c1d2e3f4a5c",
    "artifact_id": _ARTIFACT_ID,
    "artifact_job_id": JOB["id"],
    "model_name": "smollm2-135m",
    "is_complete": True,
    "settings": {
        "text": {
            "kind": "builtin",
            "name": "pydoc-topics",
            "part": "evaluation",
            "config": None,
            "split": "train",
            "text_field": "text",
        },
        "seq_len": 2048,
        "windows": 16,
        "tasks": [{"kind": "file", "name": "piqa.jsonl", "num_fewshot": None, "limit": 500}],
    },
    "metrics": _METRICS,
    "parts": {"perplexity": {"state": "done", "error": None}, "task piqa.jsonl": {"state": "done", "error": None}},
    "has_report": True,
    "created_at": _AT,
}

EVALUATION_REQUESTS: dict[str, Any] = {
    "artifact": {"summary": "An artifact on the built-in text", "value": {"artifact": _ARTIFACT_ID}},
    "model": {
        "summary": "An unquantized model on a text of yours",
        "value": {
            "model": {"source": "demo", "name": "smollm2-135m"},
            "text": {"kind": "file", "name": "held-out.txt"},
            "windows": None,
        },
    },
    "tasks": {
        "summary": "Accuracy on a task file and the kernel benchmark, besides perplexity",
        "value": {
            "artifact": _ARTIFACT_ID,
            "tasks": [{"kind": "file", "name": "piqa.jsonl", "limit": 500}],
            "speed": {"prefill_tokens": 2048, "decode_batches": [1, 16, 64]},
        },
    },
}

EVALUATION_JOB: dict[str, Any] = {
    **JOB,
    "id": EVALUATION["job_id"],
    "kind": "evaluate",
    "state": "queued",
    "started_at": None,
    "attempt": 0,
    "progress": {"phase": None, "done": 0, "total": 0},
    "recipe": None,
    "artifact_job_id": JOB["id"],
    "depends_on": [JOB["id"]],
    "layers": {"total": 0, "pending": 0, "running": 0, "done": 0, "failed": 0},
    "queue_position": 1,
    "eta_seconds": None,
    "version": 1,
}

ARTIFACT_SUMMARY: dict[str, Any] = {
    "id": _ARTIFACT_ID,
    "job_id": JOB["id"],
    "model_name": "smollm2-135m",
    "recipe_name": "duquant",
    "fingerprint": JOB["fingerprint"],
    "size_bytes": 103_000_000,
    "summary": {"bits_per_weight": 4.031, "size_ratio": 0.38},
    "tags": ["best"],
    "evaluations": [EVALUATION],
    "outdated": None,
    "created_at": "2026-01-05T09:35:00.000Z",
    "expires_at": None,
}

ARTIFACT_COMPARISON: dict[str, Any] = {
    "a": ARTIFACT_SUMMARY,
    "b": {**ARTIFACT_SUMMARY, "id": "art_0199a1b2c3d47e5f8a9b0c1d2e3f4a5c", "recipe_name": "rtn", "tags": []},
    "recipe": [{"field": "transform.rotation", "a": "greedy", "b": "none"}],
    "measures": [{"field": "perplexity (16 windows of 2048)", "a": 24.81, "b": 163.5}],
    "files": {"same": 4, "changed": ["model-layer-0000.safetensors"], "only_a": [], "only_b": []},
}

BATCH_REQUESTS: dict[str, Any] = {
    "zoo": {
        "summary": "Everything below a folder, with two recipes",
        "value": {
            "name": "zoo",
            "models": [{"source": "local", "prefix": "llama/"}, {"source": "demo", "name": "smollm2-135m"}],
            "recipes": ["rtn", "duquant"],
            "evaluate": {"windows": 16, "baseline": True},
        },
    },
    "tagged": {
        "summary": "The models of tagged artifacts",
        "value": {"models": [{"tag": "prod-*"}], "recipes": ["duquant-fast"]},
    },
}

BATCH: dict[str, Any] = {
    "id": "batch_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b",
    "name": "zoo",
    "state": "running",
    "jobs": {"total": 6, "waiting": 2, "running": 1, "succeeded": 3, "failed": 0, "refused": 0, "cancelled": 0},
    "reused": 1,
    "evaluations": {"total": 9, "waiting": 6, "running": 0, "succeeded": 3, "failed": 0, "refused": 0, "cancelled": 0},
    "created_at": "2026-01-05T09:30:00.000Z",
    "cancelled_at": None,
    "finished_at": None,
    "request": BATCH_REQUESTS["zoo"]["value"],
}

BATCH_TABLE: dict[str, Any] = {
    "rows": [
        {
            "model_name": "smollm2-135m",
            "recipe_name": "duquant",
            "state": "succeeded",
            "reason": None,
            "detail": None,
            "job_id": JOB["id"],
            "reused": False,
            "artifact_id": _ARTIFACT_ID,
            "size_bytes": 103_000_000,
            "size_ratio": 0.38,
            "seconds": 93.5,
            "perplexity": 24.81,
            "perplexity_ratio": 1.21,
            "tokens_per_second": 793.0,
            "evaluation_state": "succeeded",
            "evaluation_job_id": EVALUATION_JOB["id"],
            "evaluation_reason": None,
            "evaluation_detail": None,
        }
    ]
}

REQUANTIZED: dict[str, Any] = {
    "items": [
        {
            "artifact_id": _ARTIFACT_ID,
            "model_name": "smollm2-135m",
            "recipe_name": "duquant",
            "reason": "algorithm",
        }
    ],
    "batch": {
        **BATCH,
        "request": {"recipe": "duquant"},
        "jobs": {"total": 1, "waiting": 1, "running": 0, "succeeded": 0, "failed": 0, "refused": 0, "cancelled": 0},
        "reused": 0,
        "evaluations": {
            "total": 0,
            "waiting": 0,
            "running": 0,
            "succeeded": 0,
            "failed": 0,
            "refused": 0,
            "cancelled": 0,
        },
    },
}

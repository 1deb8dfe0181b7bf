"""Examples that the OpenAPI description shows."""

from typing import Any

from duquant.config import preset

_MODEL = {"source": "demo", "name": "smollm2-135m", "revision": None}

JOB_REQUESTS: dict[str, Any] = {
    "preset": {
        "summary": "A preset by name",
        "value": {"model": {"source": "demo", "name": "smollm2-135m"}, "recipe": "duquant"},
    },
    "calibration": {
        "summary": "A preset with other calibration data",
        "value": {
            "model": {"source": "local", "name": "my-model"},
            "recipe": "duquant-fast",
            "calibration": {"samples": 64, "source": {"kind": "file", "name": "english.txt"}},
        },
    },
    "recipe": {
        "summary": "A whole recipe",
        "value": {
            "model": {"source": "demo", "name": "smollm2-135m"},
            "recipe": {
                "name": "8-bit activations",
                "transform": {"smooth_alpha": 0.5, "rotation": "hadamard"},
                "activation": {"bits": 8},
            },
            "priority": 50,
        },
    },
    "measured": {
        "summary": "A quality gate, and an evaluation on a text and a task of yours",
        "value": {
            "model": {"source": "local", "name": "my-model"},
            "recipe": {"transform": {"rotation": "hadamard"}, "quality_gate": {"max_perplexity_increase": 0.5}},
            "evaluate": {
                "text": {"kind": "file", "name": "held-out.txt"},
                "tasks": [{"kind": "file", "name": "piqa.jsonl", "limit": 500}],
            },
        },
    },
    "later": {
        "summary": "Not before a time, not after another, and after another job",
        "value": {
            "model": {"source": "demo", "name": "smollm2-135m"},
            "recipe": "duquant",
            "run_at": "2026-01-05T22:00:00Z",
            "deadline_at": "2036-01-06T06:00:00Z",
            "depends_on": ["job_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"],
            "labels": {"team": "search"},
        },
    },
}

JOB_CHANGES: dict[str, Any] = {
    "sooner": {"summary": "Ahead of the others", "value": {"priority": 10}},
    "elsewhere": {"summary": "In another queue", "value": {"queue": "overnight"}},
    "tonight": {"summary": "Not before tonight", "value": {"run_at": "2026-01-05T22:00:00Z", "deadline_at": None}},
    "labelled": {"summary": "With these labels and no others", "value": {"labels": {"team": "search"}}},
}

JOB: dict[str, Any] = {
    "id": "job_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b",
    "kind": "quantize",
    "state": "running",
    "reason": None,
    "detail": None,
    "model": _MODEL,
    "recipe_name": "duquant",
    "queue": "default",
    "priority": 100,
    "batch_id": None,
    "labels": {"team": "search"},
    "created_at": "2026-01-05T09:30:00.000Z",
    "run_at": "2026-01-05T09:30:00.000Z",
    "deadline_at": "2026-01-06T09:30:00.000Z",
    "started_at": "2026-01-05T09:30:01.000Z",
    "finished_at": None,
    "attempt": 1,
    "max_attempts": 6,
    "lease_losses": 0,
    "gpu_seconds": 18.2,
    "progress": {"phase": "layers", "done": 12, "total": 31},
    "fingerprint": "9f2b6c0d1e8a47f35b6c7d8e9fa0b1c2d3e4f5061728394a5b6c7d8e9fa0b1c2",
    "recipe": preset("duquant").to_dict(),
    "depends_on": [],
    "artifact_job_id": None,
    "evaluation_job_ids": [],
    "layers": {"total": 31, "pending": 17, "running": 2, "done": 12, "failed": 0},
    "queue_position": None,
    "eta_seconds": 48.5,
    "result": None,
    "version": 17,
}

_DETAILS = (
    *("recipe", "depends_on", "artifact_job_id", "evaluation_job_ids", "layers"),
    *("queue_position", "eta_seconds", "result", "version"),
)
JOB_PAGE: dict[str, Any] = {
    "items": [{name: value for name, value in JOB.items() if name not in _DETAILS}],
    "next_cursor": "WzE3NjcyMzQ2MDAwMDAsICJqb2JfMDE5OWExYjJjM2Q0N2U1ZjhhOWIwYzFkMmUzZjRhNWIiXQ",
}

LAYERS: dict[str, Any] = {
    "items": [
        {
            "layer": 0,
            "state": "done",
            "attempt": 1,
            "seconds": 1.62,
            "size_bytes": 1_800_000,
            "sha256": "0c9a3f4d5e6b7a8190a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f607",
            "metrics": {"mlp_in": {"output_nmse": 0.0123}},
            "node": "worker-1",
            "detail": None,
            "started_at": "2026-01-05T09:30:02.000Z",
            "finished_at": "2026-01-05T09:30:03.620Z",
        }
    ]
}

EVENT_STREAM = (
    "retry: 3000\n\n"
    "id: 41\nevent: progress\n"
    'data: {"id": 41, "job_id": "job_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b", "at": "2026-01-05T09:30:40+00:00", '
    '"type": "progress", "actor": "worker", "data": {"phase": "layers", "done": 12, "total": 31}}\n\n'
)

ARTIFACT: dict[str, Any] = {
    "job_id": JOB["id"],
    "fingerprint": JOB["fingerprint"],
    "size_bytes": 103_000_000,
    "expires_at": "2026-01-05T09:46:00.000Z",
    "evaluation": {},
    "files": [
        {
            "name": "model-layer-0000.safetensors",
            "sha256": "0c9a3f4d5e6b7a8190a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f607",
            "size_bytes": 1_800_000,
            "url": "https://objects.example.org/duquant/artifacts/default/job_0199/layers/0000/1-1.safetensors?X-Amz-...",
        }
    ],
}

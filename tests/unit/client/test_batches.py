"""The batch file."""

import re
from pathlib import Path

from client.batches import read_zoo

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "quantize-a-zoo.md"


def test_the_file_of_the_documentation_is_read(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    (tmp_path / "zoo.yaml").write_text(block[1])
    (tmp_path / "mine.yaml").write_text("name: mine\nseed: 3\n")
    zoo = read_zoo(tmp_path / "zoo.yaml")
    assert zoo["models"][:3] == [
        {"source": "demo", "name": "smollm2-135m", "revision": None},
        {"source": "local", "prefix": "llama/"},
        {"tag": "prod-*"},
    ]
    assert zoo["recipes"] == ["rtn", "duquant", {"name": "mine", "seed": 3}]
    assert zoo["evaluate"] == {"windows": 16, "baseline": True}

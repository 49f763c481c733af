"""Which devices share the rows of a batch, and which do not."""

import jax
import pytest
from ml_collections import ConfigDict

from jaxconv.train.mesh import tell_of_idle_devices


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (16, []),
        (8, []),
        (12, ["2 of 8 devices are idle: config.batch.rows=12 is shared out to 6; "]),
        (7, ["1 of 8 devices are idle: config.batch.rows=7 is shared out to 7; "]),
        (1, ["7 of 8 devices are idle: config.batch.rows=1 is shared out to 1; "]),
    ],
)
def test_idle_devices_are_told_of(rows, said, monkeypatch, capsys):
    monkeypatch.setattr(jax, "local_devices", lambda: [object()] * 8)
    config = ConfigDict({"batch": {"rows": rows}, "other": {"rows": 8}})
    lines = tell_of_idle_devices(config, "batch.rows", "other.rows")
    assert lines == [line + "a multiple of 8 would keep all of them busy." for line in said]
    assert capsys.readouterr().out.splitlines() == lines

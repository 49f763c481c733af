"""Runs of the small task on a cluster of two nodes, of which one is lost: `two_nodes.py FOLDER URL
LOG BUDGET`. Each node has one CPU and a folder of its own.

Prints a line of JSON: how many of 100 rows have a value while both nodes are there; of 300 when a
node is lost after 80 requests and the budget is BUDGET tokens, how many have one, and the kinds of
the errors of the others; what a run says when the second node does not have the key.
"""

import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path

from small_task import FAST, TASK, endpoint, rows

from jaxconv.errors import Refused
from jaxconv.llm import Journal, run_tasks

KEY = "JAXCONV_TEST_KEY"
RAY = dataclasses.replace(FAST, executor="ray", timeout_s=10.0)


def main(folder: Path, url: str, log: Path, budget: int) -> None:
    import ray
    from ray.cluster_utils import Cluster

    def node(name: str, **environment: str) -> dict:
        (folder / name).mkdir()
        return {
            "num_cpus": 1,
            "object_store_memory": 100 << 20,
            "env_vars": {"TMPDIR": str(folder / name)} | environment,
        }

    def asked() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    cluster = Cluster(
        initialize_head=True, head_node_args=node("head") | {"include_dashboard": False}
    )
    second = cluster.add_node(**node("second"))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    model = endpoint(url, api_key_env=KEY)

    def run(n: int, settings=RAY) -> dict:
        with Journal(folder / f"{n}.sqlite") as journal:
            return run_tasks(TASK, rows(n), model, journal=journal, settings=settings)

    both = sum(result.ok for result in run(100).values())
    before = asked()

    def lose() -> None:
        while asked() < before + 80:
            time.sleep(0.02)
        cluster.remove_node(second, allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    results = run(300, dataclasses.replace(RAY, budget_tokens=budget)).values()
    thread.join()
    cluster.add_node(**node("third", **{KEY: ""}))
    try:
        said = str(run(50))
    except Refused as refused:
        said = str(refused)
    kinds = sorted({result.error.kind for result in results if result.error})
    print(json.dumps([both, sum(result.ok for result in results), kinds, said]), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))

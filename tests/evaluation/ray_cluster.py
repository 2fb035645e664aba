"""The small run on a local Ray cluster of two nodes; one node dies while it works.

`python -m tests.evaluation.ray_cluster RUN_DIR`
"""

import dataclasses
import os
import sys
import time

import jax
import ray
from ray.cluster_utils import Cluster

from gse_jax.evaluation import evaluate
from tests.evaluation.small_run import PLAN, ROOT, dataset, model


def main(run_dir):
    """Run, and take a node away after the first results."""
    jax.config.update("jax_enable_x64", True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}})
    assert int(ray.cluster_resources()["CPU"]) == 2
    killed = []

    def kill_a_node(progress):
        if progress.done > 0 and not killed:
            killed.append(progress.done)
            cluster.remove_node(second, allow_graceful=False)

    run = evaluate(dataclasses.replace(PLAN, lanes=1), run_dir, model=model(), data=dataset(),
                   engine="ray", on_progress=kill_a_node)
    assert 0 < killed[0] < run.total
    for _ in range(60):  # The cluster notices a death after some missed heartbeats.
        if ray.cluster_resources()["CPU"] == 1:
            break
        time.sleep(0.5)
    assert ray.cluster_resources()["CPU"] == 1
    print("killed a node at", killed[0], "of", run.total, flush=True)
    os._exit(0)  # The dead node's processes would keep the clean shutdown waiting.


if __name__ == "__main__":
    main(sys.argv[1])

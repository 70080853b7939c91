"""Several machines: gradients meet across them, GPUs are asked for by machine."""

from __future__ import annotations

import re

import pytest

ROW = "phi35-docvqa-full-bf16"


@pytest.fixture(scope="module")
def trained(runs):
    """trained(name, machines, processes a machine): trains the row on GPU machines (which compute on CPUs here)."""

    def train(name: str, nodes: int, per_node: int) -> str:
        pool = [{"device": "a100-80gb", "per_node": per_node, "nodes": nodes, "stand_in": True}]
        target = f"results/{name}/train/{ROW}/manifest.json"
        code, output = runs.run(runs.configure(name, [ROW], hardware=pool), target, "--printshellcmds")
        assert code == 0, output[-8000:]
        return output

    return train


@pytest.mark.verify
def test_two_machines_of_two_train_like_one_of_four(runs, cluster, trained):
    alone = trained("alone", nodes=1, per_node=4)
    together = trained("together", nodes=2, per_node=2)
    assert "scripts/torchrun_nodes.sh 2 2" in together
    assert "--nproc_per_node=4" in alone
    assert runs.losses("together", ROW) == runs.losses("alone", ROW)
    assert runs.result("together", ROW) == runs.result("alone", ROW)
    job = re.findall(r"has been submitted with SLURM jobid (\d+)", together)[-1]
    described = cluster.out("scontrol", "show", "job", job)
    assert "NumNodes=2" in described
    assert "Partition=gpu" in described
    assert "gres:gpu:a100:2" in described or "gres/gpu:a100:2" in described

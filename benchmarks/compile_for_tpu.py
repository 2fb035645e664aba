"""Compile every attack's loop for a TPU, on a machine without one: its memory and its transfers.

    pip install "jax[tpu]"      # its compiler works for chips that are not there
    JAX_PLATFORMS=cpu python benchmarks/compile_for_tpu.py [--topology v5e:2x2] [--methods gse pgd]

The model has two convolutions, so that what is read is nearly what the attack adds. Memory is of one device, as the
compiler reserves it: `arguments` are the lanes, queues and parked images, `donated` the part of them that the outputs
take over, `temporaries` all else that the program keeps but for its outputs. Nothing runs, so this tells no speed.
"""

import os
import re

# Else libtpu asks a cloud's metadata server for its chips.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

import results_file
from gse_jax.attacks import program as programs, runner
from gse_jax.attacks.algorithm import Sample
from gse_jax.attacks.lanes import LanesState, Parked, Queue
from gse_jax.attacks.packing import parked_places
from gse_jax.attacks.registry import METHODS

SHAPE = (32, 32, 3)
COLLECTIVES = r"(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
TRANSFERS = r"(?:infeed|outfeed|send|recv)\(|S\(5\)|xla_python"  # S(5) is the host's memory
MIB = 2**20


def network():
    """(params, apply_fn): two convolutions and a linear layer."""
    params = [np.zeros(shape, np.float32) for shape in ((3, 3, 3, 16), (3, 3, 16, 32), (32, 10))]

    def apply_fn(params, x):
        *kernels, dense = params
        for kernel in kernels:
            x = jax.nn.relu(jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        return x.mean((1, 2)) @ dense

    return params, apply_fn


def compiled(method, mesh, lanes):
    """The loop of an attack with its default settings, as `runner` calls it, compiled for the mesh."""
    params, apply_fn = network()
    row = METHODS[method]
    settings, hyperparams = row.preset("cifar10", False)
    hyperparams = jax.tree.map(lambda h: jnp.asarray(h, jnp.float32), hyperparams)
    program = programs.Program(apply_fn, row.bind, settings, False, (0.0, 1.0), rewrite_convolutions=False)
    per_lane, key, devices = runner._QUEUE_PER_LANE, runner.as_key(0), mesh.size
    segmented = row.segment is not None and row.segment(settings, np.zeros((0, *SHAPE))) is not None
    number = np.zeros((), np.int32)
    segments = np.zeros(SHAPE[:2], np.int32) if segmented else None
    one = Sample(np.zeros(SHAPE, np.float32), number, number, number, segments)

    def placed(tree, sharding, *leading):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((*leading, *a.shape), a.dtype, sharding=sharding), tree)

    split, whole = programs.split(mesh), programs.replicate(mesh)
    state = jax.eval_shape(program.algorithm(hyperparams, key).init, one)
    count = placed(number, split, devices)
    at_work = lambda places: placed(LanesState(state, number), split, places * devices)
    fixed = placed((params, hyperparams, key), whole)
    return programs.on_mesh(program, mesh, (1 + per_lane) * lanes).trace(
        *fixed, at_work(lanes), Queue(placed(one, split, per_lane * lanes * devices), count, count),
        Parked(at_work(parked_places(lanes)), count, count), placed(number, whole),
    ).lower(lowering_platforms=("tpu",)).compile()


def main():
    """Compile and print."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--topology", default="v5e:2x2", help="of the chips, as JAX names it")
    arguments.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments.add_argument("--lanes", type=int, help="per device; default: the attack's own")
    args = arguments.parse_args()
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    except Exception as error:  # of several kinds, by what is missing
        print(f"no compiler for a TPU, so nothing is compiled: {str(error).splitlines()[0]}")
        return
    mesh = programs.make_mesh(devices)
    lanes = args.lanes or (8 if args.smoke else runner.default_lanes_per_device("tpu", *SHAPE[:2]))
    rows = []
    for method in args.methods[:1] if args.smoke else args.methods:
        program = compiled(method, mesh, lanes)
        memory, text = program.memory_analysis(), program.as_text()
        rows.append({"method": method, "chip": devices[0].device_kind, "devices": mesh.size, "lanes": lanes,
                     "arguments_mib": memory.argument_size_in_bytes / MIB,
                     "donated_mib": memory.alias_size_in_bytes / MIB,
                     "temporaries_mib": memory.temp_size_in_bytes / MIB,
                     "collectives": len(re.findall(COLLECTIVES, text)),
                     "host_transfers": len(re.findall(TRANSFERS, text))})
        results_file.show(rows[-1])
    results_file.write("compile_for_tpu", args, rows)


if __name__ == "__main__":
    main()

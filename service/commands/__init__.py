"""The work behind each command, one file a command; each gives what `--json` prints.

`evaluate` has helpers of its own: `tasks` lists what can be measured, `finetune` is the task that
trains, `remote_encoder` makes an endpoint an encoder, `compare` lays results side by side. `doctor`
asks the questions in `doctor_checks`; `guide` reads `guide.yaml`.
"""

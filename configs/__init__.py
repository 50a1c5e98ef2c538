r"""WHAT to run: every key of a run, typed, and the recipes that set them.

    recipe.yaml --extends--> base.yaml          key=value ... (command line)
         \______________________|________________________/
                                v
                  load.py    names and types   --> InputError: file, line, key, value, what was expected
                                v
                  validate.py  ranges and sums --> InputError
                                v
                  schema.Config, resolved      --> every other folder; dump_config writes it into the run's folder

In: YAML and command-line overrides. Out: one `schema.Config`, a plain dataclass in which nothing is left to look up. Nothing in
this folder imports torch, vllm or ray: a config is checked in milliseconds, on a login node too.
"""

"""From a YAML file to a running, recovering job: config, plan, trainer, command line, torchrun, Ray."""

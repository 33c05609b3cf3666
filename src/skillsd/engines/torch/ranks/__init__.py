"""One model over several processes of one machine: ranks, started by torchrun. docs/scale.md."""

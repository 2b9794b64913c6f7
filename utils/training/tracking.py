"""Weights & Biases: a copy of TensorBoard's curves (`--wandb`)."""

from utils.errors import InputError


def start_wandb(args, folder):
    """Start a run of Weights & Biases in the project `--wandb`: whatever TensorBoard's writers,
    made afterwards, are given is copied there. Its own files go below `folder`. Raises InputError
    where wandb refuses, for instance without a login."""
    import wandb  # optional

    try:
        wandb.init(project=args.wandb, name=folder.name, dir=folder, config=vars(args),
                   sync_tensorboard=True)
    except wandb.Error as error:
        raise InputError(f"--wandb {args.wandb}: {' '.join(str(error).split())} (WANDB_MODE=offline "
                         "works without a login)") from error

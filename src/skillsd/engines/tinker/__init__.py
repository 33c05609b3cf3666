"""Training and sampling by a server that speaks the Tinker protocol: the hosted service, or SkyRL's."""

"""Skills: how they are written, kept, picked and told to the teacher (METHOD.md, steps 2 to 4). No torch."""

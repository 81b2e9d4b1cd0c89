"""The subcommands of the console command, one module each: `add_arguments(parser)` and `run(args)`."""

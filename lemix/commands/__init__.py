"""The subcommands of `lemix`: their names and options. Each imports what does its work when it is called."""

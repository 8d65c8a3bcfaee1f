from detbb.core.cli import command

command()

"""Record the public names and the options of the command line: python tests/recorded/record_public.py > public.json."""

import dataclasses
import inspect
import json

import typer.main

import celbo


def public() -> dict[str, object]:
    """Public names, parameters of functions and methods, fields of data types, options of commands."""
    try:
        from celbo.app.cli import app
    except ImportError:
        from celbo.app.cli import app

    names = {}
    for name in celbo.__all__:
        value = getattr(celbo, name)
        if dataclasses.is_dataclass(value):
            names[name] = sorted(field.name for field in dataclasses.fields(value) if field.init)
            methods = inspect.getmembers(value, inspect.isfunction)
            for method, function in methods:
                if not method.startswith("_"):
                    names[f"{name}.{method}"] = list(inspect.signature(function).parameters)[1:]
        elif inspect.isfunction(value):
            names[name] = list(inspect.signature(value).parameters)
        elif isinstance(value, dict):
            names[name] = sorted(value)
        else:
            names[name] = []
    commands = typer.main.get_command(app).commands
    options = {
        name: sorted(option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts))
        for name, command in commands.items()
    }
    return {"names": names, "commands": options}


if __name__ == "__main__":
    print(json.dumps(public(), indent=1))

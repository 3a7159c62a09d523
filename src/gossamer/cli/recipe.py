"""``gossamer recipe run``: several methods on one model, from a file."""

from typing import Annotated

from cyclopts import App, Parameter

from gossamer.cli.show import bar, console, print_json
from gossamer.recipes.recipe import Recipe

__all__ = ["app"]

app = App(name="recipe", help="Apply several methods to one model, as a YAML file says.")


@app.command
def run(file: str, *, json: Annotated[bool, Parameter(negative=())] = False) -> None:
    """Run a recipe: load its model, apply its stages in order, save where it says.

    Parameters
    ----------
    file
        YAML with model, stages (a list of methods with their parameters), and optionally data,
        samples, length, seed and out.
    json
        Print the reports as JSON.
    """
    recipe = Recipe.read(file)
    with bar(f"recipe {file}", quiet=json) as progress:
        done = recipe.run(progress)
    if json:
        print_json([stage.report().to_dict() for stage in done.stages])
        return
    console.print(done.report(), markup=False, highlight=False, soft_wrap=True)
    if recipe.out is not None:
        console.print(f"saved to {recipe.folder / recipe.out}", markup=False, highlight=False)

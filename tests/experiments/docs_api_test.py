"""Pages of docstrings: every public name of a package is there, and says."""

import importlib
import inspect
import sys

import pytest

from tests.experiments import scripts

with scripts.loaded("docs_api"):
  docs_api = sys.modules["script_docs_api"]
  PACKAGES = [name for name, is_package in docs_api.modules() if is_package]


@pytest.fixture
def package(monkeypatch):
  """Imports a package as the script does, and mends it afterwards."""

  def get(name):
    importlib.import_module(name)
    module = sys.modules[name]
    monkeypatch.setattr(module, "__all__", docs_api.offered(module), False)
    for own in module.__all__:
      monkeypatch.setattr(module, own, getattr(module, own), False)
    return docs_api.package(name)

  return get


def test_the_packages_offer_names():
  assert {"ops", "models", "research", "ops.quantized"} <= set(PACKAGES)
  assert len(docs_api.offered(sys.modules["ops"])) > 20
  assert docs_api.offered(docs_api.package("research.regression_lm")) == [
    *("Ensemble", "Example", "Prompt", "RegressionLM")
  ]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_covered_and_documented(name, package):
  from pdoc import doc

  module = package(name)
  page = doc.Module(module)
  assert page.docstring, name
  for own in docs_api.offered(module):
    member = page.members[own]
    if inspect.isroutine(member.obj) or inspect.isclass(member.obj):
      assert member.docstring, f"{name}.{own} has no docstring"
    else:
      says = f"`{own}`" in page.docstring
      assert says or member.docstring, f"{name} does not say what {own} is"


def test_a_page_shows_names_of_other_modules(package):
  import pdoc.render
  from pdoc import doc

  module = package("models.numbers")
  pdoc.render.configure(docformat="google", show_source=False)
  html = pdoc.render.html_module(doc.Module(module), all_modules={})
  for own in ("Grammar", "Ieee", "MISSING"):
    assert f'<section id="{own}">' in html
  assert "the token of what is no number" in html


def test_every_module_has_a_page():
  names = [name for name, _ in docs_api.modules()]
  assert len(names) == len(set(names)) > 200
  assert "research.core.loop" in names and "ops.__main__" not in names

# Everything here sets up what it needs first (`make setup` is quick where nothing changed). `make` alone lists the targets.

# Only from the command line: a sourced ROS sets ROS_DISTRO, too, and is not what these targets run on.
ifneq ($(origin ROS_DISTRO),command line)
ROS_DISTRO := kilted
endif
VENV ?= $(if $(filter kilted,$(ROS_DISTRO)),.venv,.venv-$(ROS_DISTRO))
PYTEST_ARGS ?= -n 2
DEMO_OUTPUT ?= build/demo

# Python of the environment, with nothing of a sourced ROS or of another environment.
PREFIX := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))
CLEAN := env -u _ROS_WHEELS_BOOTSTRAP_COMPLETE -u LD_LIBRARY_PATH -u PYTHONPATH -u PYTHONHOME -u ROS_DISTRO
RUN := $(CLEAN) AMENT_PREFIX_PATH="$(PREFIX)" "$(PREFIX)/bin/python"

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-live lint format build-ros lock clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  variables: ROS_DISTRO=kilted|jazzy  PYTHON=python3.12  TORCH_INDEX_URL=...  BAG=path  TOPIC=name  FRAMES=n  PYTEST_ARGS=..."

setup: ## ROS 2, torch and scfeat into .venv (ROS_DISTRO=jazzy: .venv-jazzy)
	@ROS_DISTRO=$(ROS_DISTRO) VENV="$(VENV)" tools/setup

demo: setup ## a camera through the live ROS 2 node; BAG=path plays a rosbag2
	@$(RUN) -m scfeat_core.cli demo --output "$(DEMO_OUTPUT)" $(if $(BAG),--bag "$(BAG)") $(if $(TOPIC),--topic "$(TOPIC)") $(if $(FRAMES),--frames $(FRAMES)) $(DEMO_ARGS)

test: setup ## the whole test suite
	$(RUN) -m pytest $(PYTEST_ARGS)

test-live: setup ## only the tests of the node on a live graph
	$(RUN) -m pytest -m live $(PYTEST_ARGS)

lint: setup ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup ## let ruff rewrite what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

build-ros: ## colcon build on a sourced ROS 2, else on the wheels of Kilted and of Jazzy
	@tools/build_ros

lock: ## resolve requirements/*.in again (needs uv)
	tools/lock

clean: ## remove what was built, keep the environments
	rm -rf build install log *.egg-info .pytest_cache .mypy_cache .ruff_cache

distclean: clean ## remove the environments, too
	rm -rf .venv .venv-*

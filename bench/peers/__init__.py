"""Other people's ways to bound a gradient, as opponents of the engine; the libraries among them are optional.

auto_LiRPA's installer asks for an older torch, and what is used of AbstractGradientTraining is a script beside its
package: both are put on the path instead of being installed.

    git clone https://github.com/Verified-Intelligence/auto_LiRPA runs/auto_LiRPA
    git clone https://github.com/psosnin/AbstractGradientTraining runs/AbstractGradientTraining
    .venv/bin/pip install appdirs graphviz pydantic gurobipy scipy tqdm pyyaml
    export PYTHONPATH=$PWD/runs/auto_LiRPA:$PWD/runs/AbstractGradientTraining

None of these packages asks for torch; gurobipy is imported and never called, so that no licence is needed. Measured:
auto_LiRPA 0.7.1 (a050a3d) and AbstractGradientTraining 0.3 (f409c6e).
"""

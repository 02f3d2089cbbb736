"""Other people's ways to bound a gradient, as opponents of the engine; the libraries among them are optional.

Neither library is on PyPI and both pin another torch, so they are put on the path instead of being installed:

    git clone https://github.com/Verified-Intelligence/auto_LiRPA peers/auto_LiRPA
    git clone https://github.com/psosnin/AbstractGradientTraining peers/AbstractGradientTraining
    pip install appdirs graphviz pydantic gurobipy scipy tqdm pyyaml        # none of these pulls in a torch
    export PYTHONPATH=$PWD/peers/auto_LiRPA:$PWD/peers/AbstractGradientTraining

gurobipy is only imported, never called: no licence is needed. Measured: auto_LiRPA 0.7.1 (a050a3d) and
AbstractGradientTraining 0.3 (f409c6e).
"""

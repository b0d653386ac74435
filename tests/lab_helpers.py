"What the tests of the lab share."
import os, subprocess, sys
from pathlib import Path
from fastai_jocor.lab import run as run_room
from fastai_jocor.lab.run import PaperSchedule

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'benchmarks'/'results'

def script(name, *args, silent=True):
    "Run a command line of the project"
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
           'PYTHONWARNINGS': 'ignore' if silent else '', 'MPLBACKEND': 'agg'}
    command = [Path(sys.executable).parent/name, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env)

def put(d, name, text):
    "Write a file into a folder that need not be there"
    d.mkdir(parents=True, exist_ok=True)
    (d/name).write_text(text)

def interrupt_at(monkeypatch, epoch):
    "Interrupt every run when it comes to an epoch"
    class Stop(PaperSchedule):
        def before_train(self):
            super().before_train()
            if self.epoch == epoch: raise KeyboardInterrupt
    monkeypatch.setattr(run_room, 'PaperSchedule', Stop)

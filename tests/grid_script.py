"Grids of runs in child processes: killed and started again, or two at once. Prints what happened as JSON."
import json, os, signal, sys, time
from pathlib import Path
import torch
from fastai_jocor.resume import Checkpoint
from fastai_jocor.lab import grid as grid_room, run as run_room
from fastai_jocor.lab.config import RunConfig
from fastai_jocor.lab.grid import run_grid
from fastai_jocor.lab.results import finished, run_dir

def in_child(f, *args):
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, 'w')
        try:
            f(*args)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return pid

def ended(pid): return os.waitpid(pid, 0)[1] == 0

def number_in(file, read=lambda o: int(o.read_text())):
    try: return read(file)
    except Exception: return -1

def epoch_of(file): return torch.load(file, weights_only=True)['epoch']

class Slow(Checkpoint):
    "Leave time to be killed between two epochs, and note where a run goes on"
    def before_epoch(self):
        super().before_epoch()
        if self.epoch == self.first_epoch:
            with open(self.where.parent/'starts', 'a') as f: f.write(f'{self.first_epoch}\n')
        time.sleep(.03)

def kill_once(cfg, out, last):
    "Start a grid of one run, and kill it when it is an epoch past a checkpoint that is newer than the last one"
    d,pid = run_dir(out, cfg),in_child(run_grid, [cfg], out, None, 1)
    while True:
        at = number_in(d/'checkpoint.pth', epoch_of)
        if at > last and number_in(d/'progress') > at: break
        assert os.waitpid(pid, os.WNOHANG)[0] == 0, f'{cfg.name} ended before it was killed'
        time.sleep(.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return dict(checkpoint=at, files=sorted(p.name for p in d.iterdir()), finished=finished(d, cfg) is not None)

def kill(root):
    res = {}
    run_room.Checkpoint = Slow
    for cfg in (RunConfig(method='standard', epochs=40), RunConfig(k=3, epochs=40, schedule='one_cycle')):
        whole,cut,kills = root/cfg.name/'whole',root/cfg.name/'cut',[]
        assert ended(in_child(run_grid, [cfg], whole, None, 1))
        for _ in range(2): kills.append(kill_once(cfg, cut, kills[-1]['checkpoint'] if kills else 0))
        assert ended(in_child(run_grid, [cfg], cut, None, 1))
        d = run_dir(cut, cfg)
        left = {n: dict(history=(run_dir(p, cfg)/'history.csv').read_text(), result=finished(run_dir(p, cfg), cfg))
                for n,p in (('whole',whole), ('cut',cut))}
        files = sorted(p.name for p in d.iterdir())
        res[cfg.name] = dict(kills=kills, files=files, starts=(d/'starts').read_text().split(), **left)
    return res

def two(root):
    "Two processes on one grid, of which each run tells when it starts"
    cfgs,log,run = [RunConfig(k=1, epochs=8, seed=s) for s in range(5)],root/'log',grid_room.run
    def told(cfg, *args, **kw):
        with open(log, 'a') as f: f.write(f'{cfg.seed} {os.getpid()}\n')
        return run(cfg, *args, **kw)
    grid_room.run = told
    def grid(i): run_grid(cfgs, root/'grid', None, 1).to_csv(root/f'{i}.csv')
    pids = [in_child(grid, i) for i in (0,1)]
    assert all([ended(p) for p in pids])
    left = [str(p) for p in (root/'grid').rglob('*') if p.name in ('lock','progress','checkpoint.pth')]
    return dict(started=log.read_text().splitlines(), tables=[(root/f'{i}.csv').read_text() for i in (0,1)], left=left)

if __name__ == '__main__':
    torch.set_num_threads(1)
    print(json.dumps(dict(kill=kill, two=two)[sys.argv[1]](Path(sys.argv[2]))))

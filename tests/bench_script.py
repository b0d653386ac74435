"Grids of runs in child processes: killed and started again, or two at once on one folder. Prints what happened as JSON."
import json, os, signal, sys, time
from pathlib import Path
import torch
from fastai_jocor.lab import grid as grid_room, run as run_room
from fastai_jocor.lab.config import RunConfig
from fastai_jocor.lab.grid import finished, run_dir, run_grid

def in_child(f, *args):
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, 'w')
        try: f(*args); os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(1)
    return pid

def ended(pid): return os.waitpid(pid, 0)[1] == 0
def epoch(f, key=lambda o: int(o.read_text())):
    try: return key(f)
    except Exception: return -1

class Slow(run_room.Checkpoint):
    "Leave time to be killed between two epochs, and note where a run goes on"
    def before_fit(self):
        super().before_fit()
        with open(self.out/'starts', 'a') as f: f.write(f'{self.start}\n')

    def after_epoch(self):
        super().after_epoch()
        time.sleep(.03)

def kill(root):
    res,run_room.Checkpoint = {},Slow
    for cfg in (RunConfig(method='standard', epochs=40), RunConfig(k=3, epochs=40, schedule='one_cycle')):
        whole,cut,kills = root/cfg.name/'whole',root/cfg.name/'cut',[]
        assert ended(in_child(run_grid, [cfg], whole, None, 1))
        d,last = run_dir(cut, cfg),-1
        while len(kills) < 2:
            pid = in_child(run_grid, [cfg], cut, None, 1)
            while True:
                at = epoch(d/'checkpoint.pth', lambda f: torch.load(f, weights_only=True)['epoch'])
                if at > last and epoch(d/'progress') > at+1: break
                assert os.waitpid(pid, os.WNOHANG)[0] == 0, f'{cfg.name} ended before it was killed {len(kills)+1} times'
                time.sleep(.001)
            os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
            last = at
            kills.append(dict(checkpoint=at, files=sorted(p.name for p in d.iterdir()), finished=finished(d, cfg) is not None))
        assert ended(in_child(run_grid, [cfg], cut, None, 1))
        res[cfg.name] = dict(kills=kills, files=sorted(p.name for p in d.iterdir()), starts=(d/'starts').read_text().split(), **{n: dict(history=(run_dir(p,cfg)/'history.csv').read_text(), result=finished(run_dir(p,cfg), cfg)) for n,p in (('whole',whole),('cut',cut))})
    return res

def two(root):
    "Two processes on one grid, of which each run tells when it starts"
    cfgs,log,run = [RunConfig(k=1, epochs=8, seed=s) for s in range(5)],root/'log',grid_room.run
    def told(cfg, *args, **kw):
        with open(log, 'a') as f: f.write(f'{cfg.seed} {os.getpid()}\n')
        return run(cfg, *args, **kw)
    grid_room.run = told
    def grid(i): run_grid(cfgs, root/'grid', None, 1).to_csv(root/f'{i}.csv')
    assert all([ended(p) for p in [in_child(grid, i) for i in (0,1)]])
    return dict(started=log.read_text().split('\n')[:-1], tables=[(root/f'{i}.csv').read_text() for i in (0,1)], left=[str(p) for p in (root/'grid').rglob('*') if p.name in ('lock','progress','checkpoint.pth')])

if __name__ == '__main__':
    torch.set_num_threads(1)
    print(json.dumps(dict(kill=kill, two=two)[sys.argv[1]](Path(sys.argv[2]))))

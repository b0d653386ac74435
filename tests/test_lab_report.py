"Tables, pictures and reports of grids."
import itertools, json, re, shutil, sys, numpy as np, pandas as pd, pytest
from dataclasses import asdict
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from scipy import stats
from fastai_jocor.lab.config import RunConfig
from fastai_jocor.lab.results import pack, run_dir
from fastai_jocor.lab.commands import jocor_report
from fastai_jocor.lab.tables import (clear_best, compare, difference_table, paired_differences, published, read_results,
                                     references, score_frame, score_table, unfinished, _like)
from fastai_jocor.lab.plots import plot_k, plot_time
from fastai_jocor.lab.report import report_blocks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))
import website

EPOCHS = 14

def history(cfg, rng):
    n = cfg.nets
    peers = .5+.03*cfg.k+.4*rng.random((cfg.epochs, n))
    losses = dict(train_loss=rng.random(cfg.epochs), valid_loss=rng.random(cfg.epochs))
    h = dict(epoch=range(cfg.epochs), **losses, accuracy=peers.mean(1)+.01, peer_accuracy=peers.mean(1))
    if cfg.method != 'standard': h['label_precision'] = rng.random(cfg.epochs)
    return pd.DataFrame(h | {f'peer_{i}': peers[:,i] for i in range(n)})

def write_run(out, cfg, h, name=None, **more):
    d = run_dir(out, cfg)
    d.mkdir(parents=True)
    h.to_csv(d/'history.csv', index=False)
    (d/'config.json').write_text(json.dumps(asdict(cfg)))
    result = dict(name=name or cfg.name, config=asdict(cfg), seconds=10.*cfg.nets+cfg.seed)
    result['machine'] = dict(processor='A & B')
    (d/'result.json').write_text(json.dumps(result | more))
    return d

def configs(seeds=4, **kw):
    ways = (('standard',1,'kl'), ('jocor',2,'kl'), ('jocor',3,'kl'), ('jocor',3,'kl_circular'))
    every = itertools.product(('symmetric:0.8','symmetric:0.2','asymmetric:0.4'), ways, range(seeds))
    return [RunConfig(**dict(noise=n, method=m, k=k, contrast=c, seed=s, epochs=EPOCHS) | kw) for n,(m,k,c),s in every]

def write_all(out, cfgs, seed=0):
    rng = np.random.default_rng(seed)
    for cfg in cfgs: write_run(out, cfg, history(cfg, rng))

@pytest.fixture
def results(tmp_path):
    "A folder of runs and their histories"
    rng = np.random.default_rng(0)
    out,hs = tmp_path/'runs',{}
    for cfg in configs():
        hs[cfg.noise,cfg.name,cfg.seed] = h = history(cfg, rng).round(6)          # as `run` writes it
        write_run(out, cfg, h)
    return out,hs

@pytest.mark.parametrize('packed', (False,True))
def test_scores_by_hand(results, packed):
    out,hs = results
    if packed: assert pack(out) == 48 and sorted(p.name for p in out.iterdir()) == ['histories.csv.gz','results.jsonl']
    df = read_results(out)
    assert len(df) == 48 and df.protocol.nunique() == 1
    rows = []
    for (n,m,s),h in hs.items():
        end = 100*h.iloc[4:]
        by_hand = end.filter(regex=r'^peer_\d').to_numpy().mean()
        rows.append(dict(noise=n, name=m, seed=s, by_hand=by_hand, best=100*h.accuracy.max(),
                         peer_accuracy=end.peer_accuracy.mean(), accuracy=end.accuracy.mean()))
    last = pd.DataFrame(rows)
    np.testing.assert_allclose(last.by_hand, last.peer_accuracy, rtol=1e-5)
    for score,col in (('peer_accuracy','by_hand'),('ensemble_accuracy','accuracy'),('best_accuracy','best')):
        t,g = score_table(df, score),last.groupby(['name','noise'])[col]
        assert list(t.index) == ['standard','jocor k=2','jocor k=3','jocor k=3 kl_circular']
        assert list(t.columns) == ['symmetric:0.2','symmetric:0.8','asymmetric:0.4']
        for (m,n),x in g: assert t.loc[m,n] == f'{x.mean():.2f} ± {np.sqrt(((x-x.mean())**2).sum()/3):.2f}'
    assert (score_table(df, 'label_precision').loc['standard'] == '–').all()
    f = score_frame(df).set_index(['noise','label'])
    two = last[(last.noise == 'symmetric:0.2') & (last.name == 'jocor k=2')]
    assert f.peer_accuracy_std['symmetric:0.2','jocor k=2'] == pytest.approx(two.by_hand.std()/100, rel=1e-4)
    assert (f.seeds == 4).all()
    first = hs['symmetric:0.2','standard',0].peer_accuracy
    assert read_results(out, last=1).peer_accuracy.iloc[0] == pytest.approx(first.iloc[-1])

def test_paired_differences_by_hand(results):
    out,hs = results
    shutil.rmtree(run_dir(out, RunConfig(noise='symmetric:0.2', k=3, seed=2, epochs=EPOCHS)))
    df = read_results(out)
    d = paired_differences(df, 'jocor k=2').set_index(['noise','method'])
    assert len(d) == 9 and d.seeds['symmetric:0.2','jocor k=3'] == 3 and d.seeds['symmetric:0.8','jocor k=3'] == 4
    def scores(m): return np.array([100*hs['symmetric:0.2',m,s].peer_accuracy.iloc[-10:].mean() for s in (0,1,3)])
    x,y = scores('jocor k=3'),scores('jocor k=2')
    r,ci = d.loc[('symmetric:0.2','jocor k=3')],stats.ttest_rel(x, y).confidence_interval(.95)
    assert [r.difference, r.low, r.high] == pytest.approx([(x-y).mean(), ci.low, ci.high]) and r.better == (x>y).sum()
    t = score_table(df)
    assert t.loc['jocor k=3','symmetric:0.2'].endswith(' (n=3)') and '(n=' not in t.loc['jocor k=3','symmetric:0.8']
    for bad in (dict(reference='jocor k=7'), dict(reference='standard', confidence=1.)):
        with pytest.raises(ValueError, match=str(list(bad)[-1])): paired_differences(df, **bad)

def test_the_head_of_the_interval_is_its_confidence(results):
    df = read_results(results[0])
    for confidence,head in ((.95,'95% interval'), (.5,'50% interval')):
        assert head in difference_table(paired_differences(df, 'standard', confidence=confidence))

def test_one_seed_has_no_interval(tmp_path):
    rng = np.random.default_rng(0)
    for cfg in configs(1): write_run(tmp_path, cfg, history(cfg, rng))
    df = read_results(tmp_path)
    assert 'the last 10 epochs' in texts(df, 'p')
    assert 'the last epoch, as' in ' '.join(str(o) for _,o in report_blocks(df, last=1))
    d = paired_differences(df, 'standard')
    assert d.low.isna().all() and (d.seeds == 1).all() and '±' not in score_table(df).to_string()
    tables = [o for k,o in report_blocks(df) if k == 'table']
    assert tables and not any(o.attrs.get('bold') for o in tables)
    assert {'noise','method','difference'} <= set(tables[-2]) and not {'95% interval','interval is'} & set(tables[-2])

def test_half_written_runs_are_left_out(results):
    out,_ = results
    ds = sorted(p for p in out.iterdir())
    (ds[0]/'result.json').write_text('{"name"')
    (ds[1]/'result.json').unlink()
    h = ds[2]/'history.csv'; h.write_text(''.join(h.read_text().splitlines(True)[:-3]))
    (ds[3]/'history.csv').unlink()
    assert len(read_results(out)) == 44 and unfinished(out) == 4

def test_protocols_and_settings_are_kept_apart(results):
    out,_ = results
    rng = np.random.default_rng(1)
    for kw in (dict(lr=.01), dict(co_lambda=.5)):
        cfg = RunConfig(noise='symmetric:0.2', k=2, epochs=EPOCHS, **kw)
        write_run(out, cfg, history(cfg, rng))
    df = read_results(out)
    assert df.protocol.nunique() == 2 and sorted(len(rs) for _,rs in df.groupby('protocol')) == [1,49]
    rs = df[df.lr == .001]
    assert {'jocor k=2 co_lambda=0.5','jocor k=2 co_lambda=default','jocor k=3','standard'} <= set(rs.label)
    again = out/'again'; shutil.copytree(run_dir(out, RunConfig(noise='symmetric:0.2', epochs=EPOCHS)), again)
    with pytest.raises(ValueError, match='second run'): read_results(out)

def texts(df, kind): return ' '.join(str(o) for k,o in report_blocks(df) if k == kind)

def test_published_figures_are_marked(tmp_path):
    write_all(tmp_path/'short', configs(1, dataset='mnist'))
    write_all(tmp_path/'full', configs(1, dataset='mnist', epochs=200, co_lambda=.95))
    runs = {n: read_results(tmp_path/n) for n in ('short','full')}
    short,full = [score_table(df, with_published=True) for df in runs.values()]
    row = short.loc['JoCoR [published, another protocol: 200 epochs of the whole of MNIST]']
    assert row.tolist() == ['98.06 ± 0.04','84.89 ± 4.55','95.24 ± 0.10']
    assert full.loc['Co-teaching+ [published]'].tolist() == ['97.81','58.92','93.28'] and len(full) == 4+4
    assert [any(_like(df, p) for p in published) for df in runs.values()] == [False,True]
    said = {n: texts(df, 'p') for n,df in runs.items()}
    assert 'not like for like' in said['short']
    assert 'not like for like' not in said['full'] and 'not ours' in said['full']

@pytest.mark.parametrize('kw', (dict(forget_rate=.3), dict(num_gradual=5)))
def test_other_settings_are_another_protocol(kw, tmp_path):
    write_all(tmp_path, configs(1, dataset='mnist', epochs=200, co_lambda=.95, **kw))
    assert not any(_like(read_results(tmp_path), p) for p in published)

def test_another_map_of_classes_has_no_published_figure(tmp_path):
    noises = ('asymmetric:0.4:cifar10','symmetric:0.2:exact')
    write_all(tmp_path, [RunConfig(dataset='mnist', noise=n, epochs=200) for n in noises])
    assert len(score_table(read_results(tmp_path), with_published=True)) == 1

def test_a_rate_found_in_training_stands_beside_a_given_one(tmp_path):
    write_all(tmp_path, [RunConfig(epochs=EPOCHS, forget_rate=rate) for rate in (.3,'auto',None)])
    assert set(read_results(tmp_path).label) == {f'jocor k=2 forget_rate={o}' for o in ('0.3','auto','default')}

def test_published_figures_of_cifar(tmp_path):
    rng,noises = np.random.default_rng(0),('symmetric:0.5','asymmetric:0.4','human:worse:labels.pt')
    for made,n in zip(('symmetric:0.5','asymmetric:0.4','symmetric:0.8'), noises):
        for name,kw in dict(part=dict(epochs=10, subset=10000), full=dict(epochs=200)).items():
            cfg = RunConfig(dataset='cifar10', noise=made, k=2, **kw)
            write_run(tmp_path/name, cfg, history(cfg, rng))
            f = run_dir(tmp_path/name, cfg)/'result.json'
            f.write_text(f.read_text().replace(made, n))   # a report does not need the file of the human labels
    part,full = [read_results(tmp_path/n) for n in ('part','full')]
    t = score_table(part, with_published=True)
    row = t.loc['JoCoR [published, another protocol: 200 epochs of the whole of CIFAR-10]', list(noises)]
    assert row.tolist() == ['79.41 ± 0.25','76.36 ± 0.49','–']
    assert 'JoCoR [published]' in score_table(full, with_published=True).index
    for df in (part,full):
        best = score_table(df, 'best_accuracy', with_published=True)
        row = best.loc['JoCoR [published, another protocol: best of 100 epochs of the whole of CIFAR-10, ResNet-34]']
        assert row[noises[2]] == '83.37 ± 0.30' and (row[list(noises[:2])] == '–').all() and len(best) == 5
        assert texts(df, 'p').count('not like for like') == (2 if df is part else 1)
    others = score_table(part[part.noise == noises[2]], with_published=True)
    ensemble = score_table(part, 'ensemble_accuracy', with_published=True)
    assert len(others) == 1 and not ensemble.index.str.contains('published').any()

class Page(HTMLParser):
    def __init__(self): super().__init__(); self.stack,self.links,self.tags,self.text = [],[],[],[]
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k,v in attrs if k in ('src','href','srcset','data','action','poster','background','style')]
        if tag not in ('meta','img','br','hr'): self.stack.append(tag)
    def handle_endtag(self, tag): assert self.stack.pop() == tag
    def handle_data(self, data): self.text.append(data)

EVIL = 'jocor <script>alert(1)</script> "x" | a_b* $x_1$ [l](http://evil.example) &amp;'

def test_page_is_whole_and_names_are_data(results):
    out,_ = results
    for f in out.glob('*jocor_k3-*/result.json'): f.write_text(json.dumps(json.loads(f.read_text()) | dict(name=EVIL)))
    jocor_report(str(out), reference=EVIL)
    page,raw = Page(),(out/'report'/'report.html').read_text()
    page.feed(raw); page.close()
    assert page.stack == [] and 'script' not in page.tags and 'a' not in page.tags and 'link' not in page.tags
    links = [o for o in page.links if not o.startswith('text-align')]
    assert links and all(re.match(r'data:image/png;base64,[A-Za-z0-9+/=]+$', o) for o in links)
    assert 'url(' not in raw and '@import' not in raw and page.tags.count('img') == 3
    assert EVIL in ''.join(page.text)
    md = (out/'report'/'report.md').read_text()
    plain = re.sub(r'\\.', '', md)
    assert 'alert' in plain and '<script' not in plain and '](http' not in plain
    rows = [l for l in md.splitlines() if 'alert' in l and l.startswith('|')]
    assert rows and all(len(re.findall(r'(?<!\\)\|', l)) in (5,9) for l in rows)
    files = {p.name for p in (out/'report').iterdir()}
    tables = {'runs.csv','scores.csv','differences.csv'}
    assert files == tables | {'report.md','report.html','curves_0.png','k_0.png','time_0.png'}
    assert EVIL in set(pd.read_csv(out/'report'/'scores.csv').label)
    assert all(b.startswith(b'\x89PNG') for b in (p.read_bytes() for p in (out/'report').glob('*.png')))
    assert len(read_results(out)) == 48

@pytest.fixture
def ranked(tmp_path):
    "Runs in which the four methods come one after the other in each seed, with label precision for two of them"
    rng = np.random.default_rng(0)
    for i,cfg in enumerate(configs(3)):
        h = history(cfg, rng)
        peers = h.filter(regex=r'^peer_\d').columns
        h[['accuracy','peer_accuracy',*peers]] = .3 + .1*(i//3%4) + .01*cfg.seed + .001*rng.random()
        if cfg.k == 3: h = h.drop(columns='label_precision')
        write_run(tmp_path/'runs', cfg, h, machine=dict(processor='x', device='cuda', torch='2.9', python='3.12'))
    return tmp_path/'runs'

def test_the_clear_best_is_bold(ranked):
    df = read_results(ranked)
    best = {n: 'jocor k=3 kl_circular' for n in df.noise.unique()}
    assert clear_best(df) == best
    jocor_report(str(ranked))
    rows = (ranked/'report'/'report.md').read_text().splitlines()
    bold = [l for l in rows if '**' in l]
    assert len(bold) == 3 and all(l.startswith('| jocor k=3 kl') and l.count('**') == 6 for l in bold)
    assert (ranked/'report'/'report.html').read_text().count('<b>') == 9
    once = (df.label == 'jocor k=2') & (df.seed > 0)
    assert clear_best(df[~once]) == best           # one seed has no interval, and only has to be below
    lucky = df.assign(peer_accuracy=df.peer_accuracy + .3*(df.label == 'jocor k=2'))[~once]
    assert clear_best(lucky) == {}
    close = df.label == 'jocor k=3'
    df.loc[close,'peer_accuracy'] = df.peer_accuracy[close] + .1 + .05*(df.seed[close]-1)
    assert clear_best(df) == {}

def test_a_report_compares_each_two_methods_once(ranked):
    jocor_report(str(ranked))
    d = pd.read_csv(ranked/'report'/'differences.csv')
    assert len(d) == 3*(3+2) and not d.duplicated(['noise','method','minus']).any()
    assert len({(r.noise, frozenset([r.method, r.minus])) for r in d.itertuples()}) == len(d)
    tables = [o for k,o in report_blocks(read_results(ranked)) if k == 'table' and 'difference' in o]
    assert [len(o) for o in tables] == [9,6] and not any('minus' in o for o in tables)
    assert all(list(o)[:4] == ['noise','method','difference','95% interval'] for o in tables)

def test_a_report_leaves_out_what_is_empty(ranked):
    df = read_results(ranked)
    df.loc[df.noise == 'asymmetric:0.4','label_precision'] = np.nan
    precision = [o for k,o in report_blocks(df) if k == 'table'][2]
    assert precision['method'].tolist() == ['jocor k=2'] and 'asymmetric:0.4' not in precision

def test_a_report_says_where_it_comes_from(ranked):
    jocor_report(str(ranked), last=5, out=str(ranked.parent/'a b'))
    text = re.sub(r'\\(.)', r'\1', (ranked.parent/'a b'/'report.md').read_text())
    command = f"jocor_report {ranked} --out '{ranked.parent}/a b' --last 5"
    said = [f'Folder: {ranked.resolve()}', f'Command: {command}', f'Date: {date.today()}']
    said += ['Processor: x', 'Device: cuda', 'Versions: torch 2.9, python 3.12']
    assert [o for o in said if o not in text] == []

@pytest.mark.skipif(website.chromium() is None, reason='Chromium is not installed')
def test_a_report_fits_a_phone(ranked):
    for f in ranked.glob('*jocor_k3-*/result.json'):
        f.write_text(json.dumps(json.loads(f.read_text()) | dict(name='a_long_name_'*20)))
    jocor_report(str(ranked))
    found = website.look(ranked/'report', only=['report.html'])
    in_a_frame = 'is cut off on a screen of [0-9]+: table' # where it scrolls
    assert [o for o in found if not re.search(in_a_frame, o)] == []

def test_best_epoch_stands_apart(results):
    blocks = list(report_blocks(read_results(results[0])))
    heads = [o for k,o in blocks if k == 'h3']
    differences = ['Differences to jocor k=2','Differences to jocor k=3']
    assert heads == ['Single peers','Ensemble','Label precision',*differences,'Best epoch','Curves']
    tables = [o for k,o in blocks if k == 'table']
    assert len(tables) == 6 and not tables[0].equals(tables[-1]) and 'no score' in [o for k,o in blocks if k == 'p'][-1]

def test_pictures_show_the_means(results):
    out,hs = results
    df = read_results(out)
    ax = plot_k(df).axes[0]
    line = next(c for c in ax.containers if c.get_label() == 'jocor').lines[0]
    def score(k, seed): return 100*hs['symmetric:0.2',f'jocor k={k}',seed].peer_accuracy.iloc[-10:].mean()
    want = [np.mean([score(k, s) for s in range(4)]) for k in (2,3)]
    assert [float(x) for x in line.get_xdata()] == [2,3] and [float(y) for y in line.get_ydata()] == pytest.approx(want)
    df.loc[(df.label == 'jocor k=2') & (df.noise == 'symmetric:0.2'),'seconds'] = [20,21,22,5000]
    ax = plot_time(df).axes[0]
    xy = next(c for c in ax.containers if c.get_label() == 'jocor k=2').lines[0]
    assert (float(xy.get_xdata()[0]), float(xy.get_ydata()[0])) == (pytest.approx(21.5), pytest.approx(want[0]))

def test_references(results):
    df = read_results(results[0])
    assert references(df) == ['jocor k=2','jocor k=3'] and references(df[df.label == 'standard']) == ['standard']

def test_report_refuses(results, tmp_path):
    (tmp_path/'empty').mkdir()
    full = str(results[0])
    for kw,msg in ((dict(folder=str(tmp_path/'no')),'is no folder'),
                   (dict(folder=str(tmp_path/'empty')),'holds no finished run'),
                   (dict(folder=full, reference='jocor'),"reference='jocor'"), (dict(folder=full, last=0),'last=0')):
        with pytest.raises(SystemExit) as e: jocor_report(**kw)
        assert msg in str(e.value)
    assert not (results[0]/'report').exists()

def test_compare_keeps_apart_what_is_not_a_seed():
    def row(noise, seed, acc):
        scores = dict(ensemble_accuracy=acc, peer_accuracy=acc, best_accuracy=acc)
        return dict(name='jocor k=2', noise=noise, seed=seed, co_lambda=.8, **scores)
    rows = [row('none',0,.9), row('none',1,.8)]
    one = compare(pd.DataFrame(rows))
    assert list(one.index) == ['jocor k=2'] and one.index.name == 'method'
    assert one['test accuracy'].item() == '85.00 ± 7.07'
    two = compare(pd.DataFrame([*rows, row('symmetric:0.8',0,.4), row('symmetric:0.8',1,.4)]))
    assert list(two.index) == [('jocor k=2','none'),('jocor k=2','symmetric:0.8')]
    assert two.index.names == ['method','noise']
    assert list(two['single peers']) == ['85.00 ± 7.07','40.00 ± 0.00']

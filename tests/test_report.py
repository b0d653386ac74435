import json, re, shutil, numpy as np, pandas as pd, pytest
from dataclasses import asdict
from html.parser import HTMLParser
from scipy import stats
from fastai_jocor.lab.config import RunConfig
from fastai_jocor.lab.results import pack, run_dir
from fastai_jocor.lab.commands import jocor_report
from fastai_jocor.lab.tables import (difference_table, paired_differences, published, read_results, references, score_frame, score_table,
                                     unfinished, _like)
from fastai_jocor.lab.plots import plot_k, plot_time
from fastai_jocor.lab.report import report_blocks

EPOCHS = 14

def history(cfg, rng):
    n = cfg.nets
    peers = .5+.03*cfg.k+.4*rng.random((cfg.epochs, n))
    h = dict(epoch=range(cfg.epochs), train_loss=rng.random(cfg.epochs), valid_loss=rng.random(cfg.epochs), accuracy=peers.mean(1)+.01, peer_accuracy=peers.mean(1))
    if cfg.method != 'standard': h['label_precision'] = rng.random(cfg.epochs)
    return pd.DataFrame(h | {f'peer_{i}': peers[:,i] for i in range(n)})

def write_run(out, cfg, h, name=None, **more):
    d = run_dir(out, cfg)
    d.mkdir(parents=True)
    h.to_csv(d/'history.csv', index=False)
    (d/'config.json').write_text(json.dumps(asdict(cfg)))
    (d/'result.json').write_text(json.dumps(dict(name=name or cfg.name, config=asdict(cfg), seconds=10.*cfg.nets+cfg.seed, machine=dict(processor='A & B')) | more))
    return d

def configs(seeds=4, **kw):
    return [RunConfig(**dict(noise=n, method=m, k=k, contrast=c, seed=s, epochs=EPOCHS) | kw) for n in ('symmetric:0.8','symmetric:0.2','asymmetric:0.4') for m,k,c in (('standard',1,'kl'),('jocor',2,'kl'),('jocor',3,'kl'),('jocor',3,'kl_circular')) for s in range(seeds)]

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
    last = pd.DataFrame([dict(noise=n, name=m, seed=s, **{c: 100*h[c].iloc[4:].mean() for c in ('peer_accuracy','accuracy')}, best=100*h.accuracy.max(), by_hand=100*h.filter(regex=r'^peer_\d').iloc[4:].to_numpy().mean()) for (n,m,s),h in hs.items()])
    np.testing.assert_allclose(last.by_hand, last.peer_accuracy, rtol=1e-5)
    for score,col in (('peer_accuracy','by_hand'),('ensemble_accuracy','accuracy'),('best_accuracy','best')):
        t,g = score_table(df, score),last.groupby(['name','noise'])[col]
        assert list(t.index) == ['standard','jocor k=2','jocor k=3','jocor k=3 kl_circular'] and list(t.columns) == ['symmetric:0.2','symmetric:0.8','asymmetric:0.4']
        for (m,n),x in g: assert t.loc[m,n] == f'{x.mean():.2f} ± {np.sqrt(((x-x.mean())**2).sum()/3):.2f}'
    assert (score_table(df, 'label_precision').loc['standard'] == '–').all()
    f = score_frame(df).set_index(['noise','label'])
    assert f.peer_accuracy_std['symmetric:0.2','jocor k=2'] == pytest.approx(last[(last.noise=='symmetric:0.2') & (last.name=='jocor k=2')].by_hand.std()/100, rel=1e-4) and (f.seeds == 4).all()
    assert read_results(out, last=1).peer_accuracy.iloc[0] == pytest.approx(hs['symmetric:0.2','standard',0].peer_accuracy.iloc[-1])

def test_paired_differences_by_hand(results):
    out,hs = results
    shutil.rmtree(run_dir(out, RunConfig(noise='symmetric:0.2', k=3, seed=2, epochs=EPOCHS)))
    df = read_results(out)
    d = paired_differences(df, 'jocor k=2').set_index(['noise','method'])
    assert len(d) == 9 and d.seeds['symmetric:0.2','jocor k=3'] == 3 and d.seeds['symmetric:0.8','jocor k=3'] == 4
    x,y = [np.array([100*hs['symmetric:0.2',m,s].peer_accuracy.iloc[-10:].mean() for s in (0,1,3)]) for m in ('jocor k=3','jocor k=2')]
    r,ci = d.loc[('symmetric:0.2','jocor k=3')],stats.ttest_rel(x, y).confidence_interval(.95)
    assert (r.difference, r.low, r.high, r.better) == (pytest.approx((x-y).mean()), pytest.approx(ci.low), pytest.approx(ci.high), (x>y).sum())
    t = score_table(df)
    assert t.loc['jocor k=3','symmetric:0.2'].endswith(' (n=3)') and '(n=' not in t.loc['jocor k=3','symmetric:0.8']
    for bad in (dict(reference='jocor k=7'), dict(reference='standard', confidence=1.)):
        with pytest.raises(ValueError, match=str(list(bad)[-1])): paired_differences(df, **bad)

def test_the_head_of_the_interval_is_its_confidence(results):
    df = read_results(results[0])
    for confidence,head in ((.95,'95% interval'),(.5,'50% interval')): assert head in difference_table(paired_differences(df, 'standard', confidence=confidence))

def test_one_seed_has_no_interval(tmp_path):
    rng = np.random.default_rng(0)
    for cfg in configs(1): write_run(tmp_path, cfg, history(cfg, rng))
    df = read_results(tmp_path)
    assert 'the last 10 epochs' in texts(df, 'p') and 'the last epoch, as' in ' '.join(str(o) for _,o in report_blocks(df, last=1))
    d = paired_differences(df, 'standard')
    assert d.low.isna().all() and (d.seeds == 1).all() and '±' not in score_table(df).to_string()
    assert any(k == 'table' and '–' in o.to_string() for k,o in report_blocks(df) if k == 'table')

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
    assert {'jocor k=2 co_lambda=0.5','jocor k=2 co_lambda=0.8','jocor k=3','standard'} <= set(rs.label)
    again = out/'again'; shutil.copytree(run_dir(out, RunConfig(noise='symmetric:0.2', epochs=EPOCHS)), again)
    with pytest.raises(ValueError, match='second run'): read_results(out)

def texts(df, kind): return ' '.join(str(o) for k,o in report_blocks(df) if k == kind)

def test_published_figures_are_marked(tmp_path):
    rng = np.random.default_rng(0)
    for cfg in configs(1, dataset='mnist'): write_run(tmp_path/'short', cfg, history(cfg, rng))
    for cfg in configs(1, dataset='mnist', epochs=200, co_lambda=.95): write_run(tmp_path/'full', cfg, history(cfg, rng))
    runs = {n: read_results(tmp_path/n) for n in ('short','full')}
    short,full = [score_table(df, with_published=True) for df in runs.values()]
    assert short.loc['JoCoR [published, another protocol: 200 epochs of the whole of MNIST]'].tolist() == ['98.06 ± 0.04','84.89 ± 4.55','95.24 ± 0.10']
    assert full.loc['Co-teaching+ [published]'].tolist() == ['97.81','58.92','93.28'] and len(full) == 4+4
    assert [any(_like(df, p) for p in published) for df in runs.values()] == [False,True]
    assert 'not like for like' in texts(runs['short'], 'p') and 'not like for like' not in texts(runs['full'], 'p') and 'not ours' in texts(runs['full'], 'p')

@pytest.mark.parametrize('kw', (dict(forget_rate=.3), dict(num_gradual=5)))
def test_other_settings_are_another_protocol(kw, tmp_path):
    for cfg in configs(1, dataset='mnist', epochs=200, co_lambda=.95, **kw): write_run(tmp_path, cfg, history(cfg, np.random.default_rng(0)))
    assert not any(_like(read_results(tmp_path), p) for p in published)

def test_another_map_of_classes_has_no_published_figure(tmp_path):
    for noise in ('asymmetric:0.4:cifar10','symmetric:0.2:exact'): write_run(tmp_path, cfg := RunConfig(dataset='mnist', noise=noise, epochs=200), history(cfg, np.random.default_rng(0)))
    assert len(score_table(read_results(tmp_path), with_published=True)) == 1

def test_a_rate_found_in_training_stands_beside_a_given_one(tmp_path):
    for rate in (.3,'auto',None): write_run(tmp_path, cfg := RunConfig(epochs=EPOCHS, forget_rate=rate), history(cfg, np.random.default_rng(0)))
    assert set(read_results(tmp_path).label) == {'jocor k=2 forget_rate=0.3','jocor k=2 forget_rate=auto','jocor k=2 forget_rate=default'}

def test_published_figures_of_cifar(tmp_path):
    rng,noises = np.random.default_rng(0),('symmetric:0.5','asymmetric:0.4','human:worse:labels.pt')
    for made,n in zip(('symmetric:0.5','asymmetric:0.4','symmetric:0.8'), noises):
        for name,kw in dict(part=dict(epochs=10, subset=10000), full=dict(epochs=200)).items():
            cfg = RunConfig(dataset='cifar10', noise=made, k=2, **kw)
            write_run(tmp_path/name, cfg, history(cfg, rng))
            f = run_dir(tmp_path/name, cfg)/'result.json'
            f.write_text(f.read_text().replace(made, n)) # the file with the human labels need not be at hand for a report
    part,full = [read_results(tmp_path/n) for n in ('part','full')]
    t = score_table(part, with_published=True)
    assert t.loc['JoCoR [published, another protocol: 200 epochs of the whole of CIFAR-10]', list(noises)].tolist() == ['79.41 ± 0.25','76.36 ± 0.49','–']
    assert 'JoCoR [published]' in score_table(full, with_published=True).index
    for df in (part,full):
        best = score_table(df, 'best_accuracy', with_published=True)
        row = best.loc['JoCoR [published, another protocol: best of 100 epochs of the whole of CIFAR-10, ResNet-34]']
        assert row[noises[2]] == '83.37 ± 0.30' and (row[list(noises[:2])] == '–').all() and len(best) == 5
        assert texts(df, 'p').count('not like for like') == (2 if df is part else 1)
    others = score_table(part[part.noise == noises[2]], with_published=True)
    assert len(others) == 1 and not score_table(part, 'ensemble_accuracy', with_published=True).index.str.contains('published').any()

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
    assert page.links and all(re.match(r'data:image/png;base64,[A-Za-z0-9+/=]+$', o) for o in page.links if not o.startswith('text-align'))
    assert 'url(' not in raw and '@import' not in raw and page.tags.count('img') == 3
    assert EVIL in ''.join(page.text)
    md = (out/'report'/'report.md').read_text()
    plain = re.sub(r'\\.', '', md)
    assert 'alert' in plain and '<script' not in plain and '](http' not in plain
    rows = [l for l in md.splitlines() if 'alert' in l and l.startswith('|')]
    assert rows and all(len(re.findall(r'(?<!\\)\|', l)) in (5,9) for l in rows)
    assert {p.name for p in (out/'report').iterdir()} == {'report.md','report.html','runs.csv','scores.csv','differences.csv','curves_0.png','k_0.png','time_0.png'}
    assert EVIL in set(pd.read_csv(out/'report'/'scores.csv').label)
    assert all(b.startswith(b'\x89PNG') for b in (p.read_bytes() for p in (out/'report').glob('*.png')))
    assert len(read_results(out)) == 48

def test_best_epoch_stands_apart(results):
    blocks = list(report_blocks(read_results(results[0])))
    heads = [o for k,o in blocks if k == 'h3']
    assert heads == ['Single peers','Ensemble','Label precision','Differences to jocor k=2','Differences to jocor k=3','Best epoch','Curves']
    tables = [o for k,o in blocks if k == 'table']
    assert len(tables) == 6 and not tables[0].equals(tables[-1]) and 'no score' in [o for k,o in blocks if k == 'p'][-1]

def test_pictures_show_the_means(results):
    out,hs = results
    df = read_results(out)
    ax = plot_k(df).axes[0]
    line = next(c for c in ax.containers if c.get_label() == 'jocor').lines[0]
    want = [100*np.mean([hs['symmetric:0.2',f'jocor k={k}',s].peer_accuracy.iloc[-10:].mean() for s in range(4)]) for k in (2,3)]
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
    for kw,msg in ((dict(folder=str(tmp_path/'no')),'is no folder'), (dict(folder=str(tmp_path/'empty')),'holds no finished run'), (dict(folder=str(results[0]), reference='jocor'),"reference='jocor'"), (dict(folder=str(results[0]), last=0),'last=0')):
        with pytest.raises(SystemExit) as e: jocor_report(**kw)
        assert msg in str(e.value)
    assert not (results[0]/'report').exists()

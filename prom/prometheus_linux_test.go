package acceptqprom

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/stretchr/testify/require"
)

// promtool accepts the rules, and they do what alerts_test.yml says.
func TestAlertRules(t *testing.T) {
	promtool := program(t, "promtool", "prometheus")
	for _, args := range [][]string{{"check", "rules", "alerts.yml"}, {"test", "rules", "alerts_test.yml"}} {
		out, err := exec.Command(promtool, args...).CombinedOutput()
		require.NoError(t, err, "promtool %v: %s", args, out)
	}
}

// promtool finds nothing to improve in the names, types and help texts.
func TestPromtoolLint(t *testing.T) {
	promtool := program(t, "promtool", "prometheus")
	c := NewCollector(WithSampler(10*time.Millisecond, time.Minute), WithShardLabel())
	reg := registered(t, c)
	_, err := c.Add("api", listen(t, acceptq.WithBacklog(3)))
	require.NoError(t, err)
	page := new(bytes.Buffer)
	serveText(reg, page)
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = page
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Empty(t, string(out))
}

func serveText(reg prometheus.Gatherer, w io.Writer) {
	req, _ := http.NewRequest("GET", "/metrics", nil)
	promhttp.HandlerFor(reg, promhttp.HandlerOpts{}).ServeHTTP(&textWriter{Writer: w, header: make(http.Header)}, req)
}

type textWriter struct {
	io.Writer
	header http.Header
}

func (w *textWriter) Header() http.Header { return w.header }
func (w *textWriter) WriteHeader(int)     {}

// Two real Prometheus servers watch a real web server whose accept queue overflows
// between two scrapes. Both find the burst, the drops and the wait, an alert fires, and
// every query of the dashboard returns data.
func TestPrometheus(t *testing.T) {
	binary := program(t, "prometheus", "prometheus")
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 20)
		const capacity = 21
		c := NewCollector(WithSampler(10*time.Millisecond, time.Minute), WithShardLabel(), WithOldestWait(5*time.Second), WithHandshakes(5*time.Second))
		reg := registered(t, c)

		ln := listen(t, acceptq.WithBacklog(64))
		api, err := c.Add("api", ln)
		require.NoError(t, err)
		shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 2)
		require.NoError(t, err)
		defer shards.Close()
		_, err = c.AddShards("shards", shards)
		require.NoError(t, err)
		other, err := net.Listen("tcp", "127.0.0.1:0") // MPTCP where the kernel offers it
		require.NoError(t, err)
		defer other.Close()
		_, err = c.Add("net.Listen", other.(*net.TCPListener))
		require.NoError(t, err)

		var scrapes atomic.Int64
		metrics := promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
		target := listen(t)
		admin := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			metrics.ServeHTTP(w, r)
			scrapes.Add(1)
		})}
		go admin.Serve(target)
		defer admin.Close()

		rules, err := os.ReadFile("alerts.yml")
		require.NoError(t, err)
		scrape := fmt.Sprintf("job_name: api, static_configs: [{targets: [%q]}]", target.Addr())
		plain := startPrometheus(t, binary, scrapeInterval, string(rules), scrape, 9090)
		native := startPrometheus(t, binary, scrapeInterval, string(rules), scrape, 9091, "--enable-feature=native-histograms")
		for _, p := range []*promServer{plain, native} {
			// increase() sees nothing in the first sample of a series.
			p.wait(t, `tcp_accept_queue_drops_total{listener="api"}`, is(0))
			p.wait(t, `tcp_accept_queue_ceiling`, is(20))
			p.wait(t, `tcp_accept_queue_capacity{listener="api"}`, is(capacity))
			p.wait(t, `tcp_accept_queue_limit{listener="api"} < tcp_accept_queue_requested`, is(20))
		}

		// The two servers scrape in turn. The burst begins after the second of two scrapes
		// that are close to each other, so that it is over before the next one, unless this
		// machine is very slow.
		var last time.Time
		for {
			before := scrapes.Load()
			require.Eventually(t, func() bool { return scrapes.Load() > before }, 60*time.Second, time.Millisecond)
			gap := time.Since(last)
			if last = time.Now(); gap < scrapeInterval/2+50*time.Millisecond {
				break
			}
		}
		before := scrapes.Load()
		clients := overflow(t, ln.Addr(), capacity)
		<-time.After(250 * time.Millisecond) // the clients wait for so long: this is the load, not a wait for something
		missed := scrapes.Load() == before
		srv := &http.Server{ConnContext: api.ConnContext, Handler: http.NotFoundHandler()}
		go srv.Serve(ln)
		defer srv.Close()
		finish(t, clients)
		t.Logf("a scrape fell into the burst: %v", !missed)

		testkit.SetSysctl(t, "net.core.somaxconn", 64)
		for _, p := range []*promServer{plain, native} {
			p.wait(t, `max_over_time(tcp_accept_queue_length_peak{listener="api"}[1m])`, is(capacity))
			if missed { // what the sampler is for
				p.wait(t, `max_over_time(tcp_accept_queue_length{listener="api"}[1m])`, is(0))
			}
			p.wait(t, `tcp_accept_queue_drops_total{listener="api"}`, atLeast(1))
			p.wait(t, `tcp_listen_overflows_total`, atLeast(1))
			p.wait(t, `tcp_accept_queue_ceiling`, is(64))
			require.Empty(t, p.query(t, `{__name__=~"tcp_.*"} < 0`), "what is unknown is absent")
			require.Empty(t, p.query(t, `tcp_accept_queue_requested{listener="net.Listen"}`))
		}
		plain.wait(t, `tcp_accept_queue_wait_seconds_count{listener="api"}`, is(capacity))
		plain.wait(t, `tcp_accept_queue_wait_seconds_sum{listener="api"} / tcp_accept_queue_wait_seconds_count`, atLeast(0.24))
		plain.wait(t, `tcp_accept_queue_wait_seconds_bucket{listener="api",le="0.1"}`, is(0))
		native.wait(t, `histogram_count(tcp_accept_queue_wait_seconds{listener="api"})`, is(capacity))
		native.wait(t, `histogram_quantile(0.5, tcp_accept_queue_wait_seconds{listener="api"})`, atLeast(0.22))

		plain.waitAlert(t, "AcceptQueueDrops", "api", "firing")
		plain.waitAlert(t, "AcceptQueueClamped", "api", "pending", "firing")
		plain.waitAlert(t, "AcceptQueueCeilingNotApplied", "api", "pending", "firing")

		_, d := readDashboard(t)
		variables := regexp.MustCompile(`\$\w+`)
		filled := func(query string) string {
			return variables.ReplaceAllStringFunc(query, func(v string) string {
				if v == "$__rate_interval" {
					return "1m"
				}
				return ".*"
			})
		}
		for _, panel := range d.Panels {
			for _, target := range panel.Targets {
				plain.wait(t, filled(target.Expr), func(v float64) bool { return v == v }) // not NaN
			}
		}
		for _, v := range d.Templating.List {
			if m := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`).FindStringSubmatch(v.Definition); m != nil {
				var values []string
				plain.get(t, "label/"+m[2]+"/values?"+url.Values{"match[]": {filled(m[1])}}.Encode(), &values)
				require.NotEmpty(t, values, v.Name)
			} else {
				require.Equal(t, "datasource", v.Type)
			}
		}

		// A closed listener ends its series without an error in the scrape.
		require.NoError(t, other.Close())
		plain.eventually(t, "the series of the closed listener end", func() bool {
			return len(plain.query(t, `tcp_accept_queue_length{listener="net.Listen"}`)) == 0
		})
		require.Empty(t, plain.query(t, `up == 0`))
		require.Empty(t, plain.query(t, `min_over_time(up[5m]) == 0`), "no scrape failed")
	})
}

// overflow fills the accept queue of addr, where n connections fit, and lets one more
// client meet it full.
func overflow(t *testing.T, addr net.Addr, n int) (clients []net.Conn) {
	t.Helper()
	for range n {
		c, err := net.DialTimeout("tcp", addr.String(), 20*time.Second)
		require.NoError(t, err)
		clients = append(clients, c)
		t.Cleanup(func() { c.Close() })
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wait sync.WaitGroup
	wait.Go(func() {
		if c, err := new(net.Dialer).DialContext(ctx, "tcp", addr.String()); err == nil {
			c.Close()
		}
	})
	require.Eventually(t, func() bool {
		s, err := acceptq.ReadSystem()
		return err == nil && s.ListenOverflows > 0
	}, 20*time.Second, time.Millisecond)
	cancel()
	wait.Wait()
	return clients
}

// finish sends a request on each connection and reads the answer.
func finish(t *testing.T, clients []net.Conn) {
	t.Helper()
	for _, c := range clients {
		fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		require.NoError(t, err)
		resp.Body.Close()
		c.Close()
	}
}

const scrapeInterval = 2 * time.Second

// A promServer is a real Prometheus.
type promServer struct{ base string }

func startPrometheus(t *testing.T, binary string, interval time.Duration, rules, scrape string, port int, args ...string) *promServer {
	t.Helper()
	return configurePrometheus(t, binary, interval, rules, "rule_files: [alerts.yml]\nscrape_configs: [{"+scrape+"}]\n", port, args...)
}

// configurePrometheus starts a Prometheus with a configuration file that names the rules alerts.yml.
func configurePrometheus(t *testing.T, binary string, interval time.Duration, rules, text string, port int, args ...string) *promServer {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "alerts.yml"), []byte(rules), 0o600))
	require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, "global: {scrape_interval: %v, evaluation_interval: %v}\n%s",
		interval, min(interval, time.Second), text), 0o600))
	var out bytes.Buffer
	cmd := exec.Command(binary, append(args, "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address=127.0.0.1:"+strconv.Itoa(port))...)
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("prometheus: %s", &out)
		}
	})
	return &promServer{fmt.Sprintf("http://127.0.0.1:%d/api/v1/", port)}
}

// try asks the HTTP API.
func (p *promServer) try(path string, data any) error {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}
	resp, err := client.Get(p.base + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return fmt.Errorf("%s: %w", resp.Status, err)
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s: %s", path, answer.Error)
	}
	return nil
}

func (p *promServer) get(t *testing.T, path string, data any) {
	t.Helper()
	require.NoError(t, p.try(path, data))
}

type vector struct {
	Result []struct {
		Metric map[string]string
		Value  [2]any
	}
}

// tryQuery returns the values of an instant query.
func (p *promServer) tryQuery(query string) ([]float64, error) {
	var v vector
	if err := p.try("query?"+url.Values{"query": {query}}.Encode(), &v); err != nil {
		return nil, err
	}
	var values []float64
	for _, r := range v.Result {
		n, err := strconv.ParseFloat(r.Value[1].(string), 64)
		if err != nil {
			return nil, err
		}
		values = append(values, n)
	}
	return values, nil
}

func (p *promServer) query(t *testing.T, query string) []float64 {
	t.Helper()
	values, err := p.tryQuery(query)
	require.NoError(t, err)
	return values
}

func is(want float64) func(float64) bool      { return func(v float64) bool { return v == want } }
func atLeast(want float64) func(float64) bool { return func(v float64) bool { return v >= want } }

// wait asks until a value of the query is good.
func (p *promServer) wait(t *testing.T, query string, good func(float64) bool) {
	t.Helper()
	var last any
	p.eventually(t, query, func() bool {
		values, err := p.tryQuery(query)
		last = fmt.Sprint(values, err)
		return err == nil && slices.ContainsFunc(values, good)
	}, &last)
}

func (p *promServer) waitAlert(t *testing.T, name, listener string, states ...string) {
	t.Helper()
	var last any
	p.eventually(t, "alert "+name, func() bool {
		var data struct {
			Alerts []struct {
				Labels map[string]string
				State  string
			}
		}
		err := p.try("alerts", &data)
		last = fmt.Sprint(data, err)
		for _, a := range data.Alerts {
			if a.Labels["alertname"] == name && a.Labels["listener"] == listener && slices.Contains(states, a.State) {
				return true
			}
		}
		return false
	}, &last)
}

func (p *promServer) eventually(t *testing.T, what string, f func() bool, last ...*any) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !f(); <-time.After(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			var seen []string
			for _, l := range last {
				seen = append(seen, fmt.Sprint(*l))
			}
			t.Fatalf("%s: %s: not in a minute; the last answer: %s", p.base, what, strings.Join(seen, " "))
		}
	}
}

package acceptqprom

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/rawtcp"
	"github.com/acceptq/acceptq/internal/testkit"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/stretchr/testify/require"
)

// configs returns the blocks of the README that configure Prometheus.
func configs(t *testing.T) (all []string) {
	t.Helper()
	readme, err := files.ReadFile("README.md")
	require.NoError(t, err)
	for _, m := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllSubmatch(readme, -1) {
		all = append(all, string(m[1]))
	}
	return all
}

func TestConfigsOfReadme(t *testing.T) {
	promtool := program(t, "promtool", "prometheus")
	rules, err := files.ReadFile("alerts.yml")
	require.NoError(t, err)
	all := configs(t)
	require.NotEmpty(t, all)
	for _, text := range all {
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dir, "alerts.yml"), rules, 0o600))
		config := filepath.Join(dir, "prometheus.yml")
		require.NoError(t, os.WriteFile(config, []byte(text), 0o600))
		out, err := exec.Command(promtool, "check", "config", config).CombinedOutput()
		require.NoError(t, err, "%s: %s", text, out)
	}
}

// A Collector and the exporter run on one machine, where a queue overflows and SYNs flood it.
// With the configuration of the README each alert fires once.
func TestBothOnOneMachine(t *testing.T) {
	binary := program(t, "prometheus", "prometheus")
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listen(t, acceptq.WithBacklog(16))
		c := NewCollector(WithSampler(10*time.Millisecond, quickMinute))
		own := registered(t, c)
		_, err := c.Add("api", ln)
		require.NoError(t, err)
		machine, err := NewMachineCollector()
		require.NoError(t, err)
		exporter := prometheus.NewRegistry()
		exporter.MustRegister(machine)
		pageOf := func(reg *prometheus.Registry) string {
			ln := listen(t)
			srv := &http.Server{Handler: promhttp.HandlerFor(reg, promhttp.HandlerOpts{})}
			go srv.Serve(ln)
			t.Cleanup(func() { srv.Close() })
			return ln.Addr().String()
		}
		both := slices.IndexFunc(configs(t), func(text string) bool { return strings.Count(text, "metric_relabel_configs") == 2 })
		require.GreaterOrEqual(t, both, 0)
		port := address(ln).Port()
		config := strings.NewReplacer("localhost:8081", pageOf(own), "localhost:10511", pageOf(exporter), ":8080", fmt.Sprint(":", port)).
			Replace(configs(t)[both])
		p := configurePrometheus(t, binary, 500*time.Millisecond, quick(t), config, 9090)
		p.wait(t, `tcp_accept_queue_drops_total{job="api"}`, is(0)) // increase() needs a first sample
		p.wait(t, `tcp_syn_queue_cookies_total{job="acceptq"}`, is(0))
		p.wait(t, `count(tcp_accept_queue_length{job="acceptq"})`, is(3)) // two of /metrics, and Prometheus

		w, err := rawtcp.Open()
		require.NoError(t, err)
		defer w.Close()
		for i := range 100 {
			require.NoError(t, w.Send(rawtcp.Segment{From: sender(i), To: address(ln), Seq: 1, Flags: rawtcp.SYN}))
		}
		overflow(t, ln.Addr(), 17)
		want := map[string]float64{"AcceptQueueDrops of api": 1, "AcceptQueueFilling of api": 1, "AcceptQueueStuck of api": 1, "SYNQueueFull of acceptq": 1}
		fired := func() map[string]float64 {
			all := make(map[string]float64)
			var v vector
			p.get(t, "query?query="+`count+by+(alertname,job)(count_over_time(ALERTS{alertstate="firing"}[5m]))`, &v)
			for _, r := range v.Result {
				all[r.Metric["alertname"]+" of "+r.Metric["job"]]++
			}
			return all
		}
		var last any
		p.eventually(t, "the alarms", func() bool { last = fired(); return len(fired()) >= len(want) }, &last)
		slowest := time.Now().Add(7 * quickMinute)
		p.eventually(t, "the slowest rule", func() bool { return time.Now().After(slowest) })
		require.Equal(t, want, fired())
	})
}

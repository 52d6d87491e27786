package acceptqprom

import (
	"embed"
	"encoding/json"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/stretchr/testify/require"
)

// These files are in the test binary, so that it runs without the source tree.
//
//go:embed dashboard.json README.md alerts.yml
var files embed.FS

// grafana has what the tests need of dashboard.json.
type grafana struct {
	Panels []struct {
		Title   string
		Targets []struct{ Expr string }
	}
	Templating struct {
		List []struct{ Type, Name, Definition string }
	}
}

func readDashboard(t *testing.T) (raw []byte, d grafana) {
	t.Helper()
	raw, err := files.ReadFile("dashboard.json")
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(raw, &d))
	require.NotEmpty(t, d.Panels)
	return raw, d
}

// The dashboard and the alert rules use all metrics, and no others.
func TestMetricNames(t *testing.T) {
	c := NewCollector(WithSampler(10*time.Millisecond, time.Minute), WithOldestWait(5*time.Second), WithHandshakes(5*time.Second))
	reg := registered(t, c)
	_, err := c.Add("api", listen(t))
	require.NoError(t, err)
	shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 2)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	require.NoError(t, err)
	defer shards.Close()
	_, err = c.AddShards("shards", shards)
	require.NoError(t, err)
	known := make(map[string]bool)
	families, err := reg.Gather()
	require.NoError(t, err)
	for _, f := range families {
		known[f.GetName()] = true
	}
	known["tcp_accept_queue_requested"] = true // absent without WithBacklog
	known["tcp_accept_queue_held_back"] = true // FreeBSD

	readme, err := files.ReadFile("README.md")
	require.NoError(t, err)
	rules, err := files.ReadFile("alerts.yml")
	require.NoError(t, err)
	raw, _ := readDashboard(t)
	name := regexp.MustCompile(`\btcp_(accept|listen|syn)_[a-z_]+\b:?`)
	for file, text := range map[string]string{"README.md": string(readme), "alerts.yml": string(rules), "dashboard.json": string(raw)} {
		for _, n := range name.FindAllString(text, -1) {
			if strings.HasSuffix(n, ":") {
				continue // a recording rule
			}
			if n = strings.TrimSuffix(strings.TrimSuffix(n, "_bucket"), "_count"); !known[n] && waits {
				t.Errorf("%s: no metric %s", file, n)
			}
		}
	}
	for n := range known {
		require.Contains(t, string(readme), "`"+n+"`")
	}
}

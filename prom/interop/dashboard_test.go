package interop

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/heatmap"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
	"github.com/stretchr/testify/require"
)

// Grafana's own types take every field of the dashboard, with its panels and queries.
func TestDashboardSchema(t *testing.T) {
	plugins.RegisterDefaultPlugins()
	raw, err := os.ReadFile("../dashboard.json")
	require.NoError(t, err)
	var d schema
	require.Empty(t, problems(d.UnmarshalJSONStrict(raw)))
	require.Empty(t, problems(d.Validate()))
	require.NotEmpty(t, d.Panels)

	// Dashboard does not check the settings that a type of panel has for its fields.
	var rest struct {
		Panels []struct {
			Type        string
			FieldConfig struct {
				Defaults struct{ Custom json.RawMessage }
			}
		}
	}
	require.NoError(t, json.Unmarshal(raw, &rest))
	for _, p := range rest.Panels {
		switch custom := p.FieldConfig.Defaults.Custom; p.Type {
		case "timeseries":
			require.Empty(t, problems(new(timeseries.FieldConfig).UnmarshalJSONStrict(custom)))
		case "heatmap":
			require.Empty(t, problems(new(heatmap.FieldConfig).UnmarshalJSONStrict(custom)))
		default:
			t.Errorf("a panel of type %s", p.Type)
		}
	}

	for _, field := range []string{`"expr"`, `"gridPos"`, `"cellGap"`} {
		wrong := strings.Replace(string(raw), field, `"mistake"`, 1)
		require.Contains(t, problems(new(schema).UnmarshalJSONStrict([]byte(wrong))), "mistake", field)
	}
}

// A schema is the classic dashboard, which every Grafana imports. The package prefers version 2.
//
//lint:ignore SA1019 version 2 needs a newer Grafana
type schema = dashboard.Dashboard

// problems is the text of err. Without a problem the package returns an empty list, which
// is not nil.
func problems(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

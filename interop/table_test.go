//go:build unix

package interop

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The rows of docs/interop.md match the tests of this module. Each row names tests that
// exist, has a line of their source, and the version that they ran with. Each required
// module and each test of a peer has a row.
func TestTableOfPeers(t *testing.T) {
	where := map[string]string{} // the source file of each test
	var peers []string
	files, err := filepath.Glob("*_test.go")
	require.NoError(t, err)
	for _, file := range files {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllSubmatch(text, -1) {
			where[string(m[1])] = string(text)
			if file == "peers_linux_test.go" {
				peers = append(peers, string(m[1]))
			}
		}
	}
	require.NotEmpty(t, peers)

	gomod, err := os.ReadFile("go.mod")
	require.NoError(t, err)
	direct, _, _ := strings.Cut(string(gomod), "// indirect")
	modules := map[string]string{} // versions
	for _, m := range regexp.MustCompile(`(?m)^\t(\S+) (v\S+)$`).FindAllStringSubmatch(direct, -1) {
		modules[m[1]] = m[2]
	}
	goVersion := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(string(gomod))[1]

	text, err := os.ReadFile("../docs/interop.md")
	require.NoError(t, err)
	seen := map[string]bool{} // modules and tests
	rows := regexp.MustCompile(`(?m)^\| \[([^]]+)\]\(https://([^)]+)\).*\|$`).FindAllStringSubmatch(string(text), -1)
	require.Equal(t, strings.Count(string(text), "\n| ")-2, len(rows), "a row without a link to its peer")
	for _, row := range rows {
		name, link := row[1], strings.TrimPrefix(row[2], "pkg.go.dev/")
		cells := strings.Split(row[0], " | ")
		require.Len(t, cells, 6, name)
		version, pass := cells[1], strings.Trim(cells[2], "`")

		want := "Go " + goVersion
		if program, flag := programOf(name); program != "" {
			want = programVersion(t, program, flag)
		}
		for module, v := range modules {
			if link == module || strings.HasPrefix(link, module+"/") {
				want = v
				seen[module] = true
			}
		}
		if want != "" {
			require.Equal(t, want, version, name)
		}
		tests := regexp.MustCompile(`Test\w+`).FindAllString(cells[5], -1)
		require.NotEmpty(t, tests, name)
		shown := false
		for _, test := range tests {
			require.Contains(t, where, test, name)
			shown = shown || strings.Contains(where[test], pass)
			seen[test] = true
		}
		require.True(t, shown, "%s: no line of its tests is %s", name, pass)
	}

	for module := range modules {
		switch module {
		case "github.com/acceptq/acceptq", "github.com/stretchr/testify", "golang.org/x/sys":
		default:
			require.True(t, seen[module], "no row for %s", module)
		}
	}
	for _, test := range peers {
		require.True(t, seen[test], "no row for %s", test)
	}
}

// programOf has the program of each row that is not a module, and the flag with which
// it prints its version.
func programOf(name string) (program, flag string) {
	switch name {
	case "systemd-socket-activate":
		return name, "--version"
	case "HAProxy", "nginx":
		return strings.ToLower(name), "-v"
	}
	return "", ""
}

// programVersion returns the version of an installed program without its last number,
// which Debian can change within a release. It returns "" if the program is not
// installed.
func programVersion(t *testing.T, program, flag string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/" + program); err != nil {
			return "" // the test that needs the program reports this
		}
	}
	out, err := exec.Command(path, flag).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return regexp.MustCompile(`\d+(\.\d+)?`).FindString(string(out))
}

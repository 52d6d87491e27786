package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const page = `# Changelog

## [Unreleased]

### Added

- ` + "`Listen`, `Shards.Len`" + `: new.

[Unreleased]: https://github.com/acceptq/acceptq/commits/main
`

func TestChangelogGetsTheVersion(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "CHANGELOG.md")
	require.NoError(t, os.WriteFile(name, []byte(page), 0o666))
	day := time.Date(2026, 12, 24, 0, 0, 0, 0, time.UTC)
	require.NoError(t, releaseChangelog(dir, "v0.1.0", day))
	text, err := os.ReadFile(name)
	require.NoError(t, err)
	require.Equal(t, `# Changelog

## [Unreleased]

## [0.1.0] - 2026-12-24

### Added

- `+"`Listen`, `Shards.Len`"+`: new.

[Unreleased]: https://github.com/acceptq/acceptq/compare/v0.1.0...main
[0.1.0]: https://github.com/acceptq/acceptq/releases/tag/v0.1.0
`, string(text))

	require.ErrorContains(t, releaseChangelog(dir, "v0.2.0", day), "nothing is listed")
	next := strings.Replace(string(text), unreleased, unreleased+"\n- More.\n", 1)
	require.NoError(t, os.WriteFile(name, []byte(next), 0o666))
	for _, version := range []string{"v0.1.0", "v0.0.9", "v0.1.0-rc.1"} {
		require.ErrorContains(t, releaseChangelog(dir, version, day), "not greater than the last one, v0.1.0")
	}
	require.NoError(t, releaseChangelog(dir, "v0.2.0", day))
	text, err = os.ReadFile(name)
	require.NoError(t, err)
	require.Contains(t, string(text), "## [Unreleased]\n\n## [0.2.0] - 2026-12-24\n\n- More.\n\n## [0.1.0] - 2026-12-24\n")
	require.Contains(t, string(text), "/compare/v0.2.0...main\n[0.2.0]: https://")
}

func TestVersionIsWellFormed(t *testing.T) {
	for _, version := range []string{"", "0.1.0", "v0.1", "v0.1.0+meta", "v2.0.0", "v0.01.0", "latest"} {
		require.Error(t, prepare(t.TempDir(), version, time.Now()), version)
	}
}

func TestNestedModuleRequiresTheVersion(t *testing.T) {
	name := filepath.Join(t.TempDir(), "go.mod")
	write := func(module string) {
		require.NoError(t, os.WriteFile(name, []byte(`module `+module+`

go 1.26.0

replace (
	github.com/acceptq/acceptq => ../..
	github.com/acceptq/acceptq/prom => ../../prom
)

require (
	example.com/other v1.0.0
	github.com/acceptq/acceptq v0.0.0
	github.com/acceptq/acceptq/prom v0.0.0
)
`), 0o666))
		require.NoError(t, releaseModule(name, "v0.1.0"))
	}
	const requires = `require (
	example.com/other v1.0.0
	github.com/acceptq/acceptq v0.1.0
	github.com/acceptq/acceptq/prom v0.1.0
)
`
	write("github.com/acceptq/acceptq/otel")
	text, err := os.ReadFile(name)
	require.NoError(t, err)
	require.Equal(t, "module github.com/acceptq/acceptq/otel\n\ngo 1.26.0\n\n"+requires, string(text))

	write("github.com/acceptq/acceptq/otel/interop") // nobody fetches this one
	text, err = os.ReadFile(name)
	require.NoError(t, err)
	require.Contains(t, string(text), "github.com/acceptq/acceptq => ../..\n")
	require.True(t, strings.HasSuffix(string(text), requires), "%s", text)
}

func TestChangelogMustNameChanges(t *testing.T) {
	parse := func(lines ...string) face { return append(face{"package p", ""}, lines...) }
	last := parse("func Listen()", "method (*Shards) Len() int", "method (*Shards) Old()", "type Shards struct", "type Gone struct", "field Gone.N int")
	now := parse("func Listen() error", "method (*Shards) Len() int64", "method (Shards) New()", "type Shards struct", "type Fresh struct", "field Fresh.N int")
	named := func(words ...string) map[string]bool {
		all := make(map[string]bool)
		for _, word := range words {
			all[word] = true
		}
		return all
	}
	var missing []string
	for _, err := range unmentioned(last, now, named()) {
		missing = append(missing, strings.Fields(err.Error())[1])
	}
	require.Equal(t, []string{"Listen", "Shards.Len", "Shards.Old", "Shards.New", "Fresh", "Gone"}, missing)
	require.Empty(t, unmentioned(last, now, named("Listen", "Len", "Old", "New", "Fresh", "Gone")))
	require.Empty(t, unmentioned(last, last, named()))
	require.Len(t, difference(last, now), 10)

	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "CHANGELOG.md"), []byte(page), 0o666))
	log, err := readChangelog(dir)
	require.NoError(t, err)
	require.Equal(t, named("Listen", "Shards", "Len"), log.names())
}

func TestFace(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) { require.NoError(t, writeFile(filepath.Join(dir, name), []byte(text), 0o666)) }
	write("go.mod", "module example.com/m\n\ngo 1.26.0\n")
	write("internal/in/in.go", "package in\n\nfunc Hidden() {}\n")
	write("cmd/c/c.go", "package main\n\nfunc Main() {}\n\nfunc main() {}\n")
	write("m_linux.go", "package m\n\nfunc Linux(name string) {}\n")
	write("m.go", `package m

import "io"

const Max = -1

var Err error

type base struct{}

func (base) Promoted() {}

type T struct {
	base
	io.Reader
	N, hidden int
}

func (*T) Set(n int, f func(x int) (err error)) (old int) { return 0 }
func (T) hide() {}

type I interface {
	io.Closer
	hide()
}

type Same = T

type List []T

func (List) Len() int { return 0 }
`)
	f, err := faceOf(dir)
	require.NoError(t, err)
	require.Equal(t, `package example.com/m

const Max untyped int = -1
field T.N int
field T.Reader io.Reader (embedded)
func Linux(string) // linux
method (*T) Set(int, func(int) error) int
method (I) Close() error
method (I) hide, unexported
method (List) Len() int
method (T) Promoted()
method (T) Read([]byte) (int, error)
type I interface
type List []T
type Same = T
type T struct
var Err error
`, f.String())

	write("m.go", "package m\n\nfunc (\n")
	_, err = faceOf(dir)
	require.Error(t, err)
}

// git runs git in dir, without the settings of the user.
func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL="+os.DevNull, "GIT_CONFIG_SYSTEM="+os.DevNull,
		"GIT_AUTHOR_NAME=test", "GIT_AUTHOR_EMAIL=test@example.com", "GIT_COMMITTER_NAME=test", "GIT_COMMITTER_EMAIL=test@example.com")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "git %v: %s", args, out)
	return string(out)
}

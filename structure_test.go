package acceptq

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// netListens has the systems on which package net creates the socket. A file that is built
// there, such as a portable file, must not import golang.org/x/sys.
var netListens = []string{"windows", "solaris", "illumos", "aix", "plan9", "js", "wasip1"}

// source is a file of the package, as parsed.
type source struct {
	name string
	*ast.File
}

// imports has the paths that the file imports, with their local names.
func (f source) imports() map[string]string {
	paths := map[string]string{}
	for _, spec := range f.Imports {
		importPath, _ := strconv.Unquote(spec.Path.Value)
		paths[importPath] = importPath[strings.LastIndex(importPath, "/")+1:]
		if spec.Name != nil {
			paths[importPath] = spec.Name.Name
		}
	}
	return paths
}

// parse parses the Go files of dir for all systems.
func parse(t *testing.T, dir string) (files []source) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	require.NoError(t, err)
	for _, name := range names {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution|parser.ParseComments)
		require.NoError(t, err)
		files = append(files, source{filepath.Base(name), f})
	}
	return files
}

// parsePackage returns the files of the package, and those of its tests.
func parsePackage(t *testing.T) (files, tests []source) {
	t.Helper()
	if _, err := os.Stat("backlog.go"); err != nil {
		t.Skipf("the source is not here (%v): run go test in the source tree", err)
	}
	for _, f := range parse(t, ".") {
		if strings.HasSuffix(f.name, "_test.go") {
			tests = append(tests, f)
		} else {
			files = append(files, f)
		}
	}
	return files, tests
}

func TestPortableFilesDoNotImportSys(t *testing.T) {
	files, tests := parsePackage(t)
	confined := 0
	for _, f := range append(files, tests...) {
		for path := range f.imports() {
			if !strings.HasPrefix(path, "golang.org/x/sys/") {
				continue
			}
			confined++
			for _, goos := range netListens {
				system := build.Default
				system.GOOS = goos
				built, err := system.MatchFile(".", f.name)
				require.NoError(t, err)
				require.False(t, built, "%s imports %s and is built on %s", f.name, path, goos)
			}
		}
	}
	require.NotZero(t, confined, "no file imports x/sys: this test checks nothing")
}

func TestModuleDependsOnlyOnSys(t *testing.T) {
	parsePackage(t) // or skip
	err := filepath.WalkDir(".", func(dir string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		_, nested := os.Stat(filepath.Join(dir, "go.mod"))
		if name := d.Name(); dir != "." && (nested == nil || name == "testdata" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_")) {
			return filepath.SkipDir
		}
		if dir == filepath.Join("internal", "testkit") { // only tests import it, see below
			return nil
		}
		for _, f := range parse(t, dir) {
			if strings.HasSuffix(f.name, "_test.go") {
				continue
			}
			for path := range f.imports() {
				first, _, _ := strings.Cut(path, "/")
				ours := path == module || strings.HasPrefix(path, module+"/")
				sys := strings.HasPrefix(path, "golang.org/x/sys/")
				require.True(t, ours || sys || !strings.Contains(first, "."), "%s imports %s", filepath.Join(dir, f.name), path)
				require.NotEqual(t, "C", path, f.name)
			}
		}
		return nil
	})
	require.NoError(t, err)
}

// rooms are the folders of the root module that have packages of the library.
func rooms(t *testing.T) (dirs []string) {
	t.Helper()
	parsePackage(t) // or skip
	for _, pattern := range []string{".", "cmd/*", "e2e", "internal/*"} {
		found, err := filepath.Glob(pattern)
		require.NoError(t, err)
		dirs = append(dirs, found...)
	}
	return dirs
}

// The tests that SECURITY.md names exist.
func TestSecurityNamesTests(t *testing.T) {
	there := map[string]bool{}
	for _, dir := range rooms(t) {
		for _, f := range parse(t, dir) {
			for _, decl := range f.Decls {
				if d, ok := decl.(*ast.FuncDecl); ok {
					there[d.Name.Name] = true
				}
			}
		}
	}
	text, err := os.ReadFile("SECURITY.md")
	require.NoError(t, err)
	names := regexp.MustCompile("`((?:Test|Fuzz)\\w+)`").FindAllSubmatch(text, -1)
	require.Greater(t, len(names), 10, "this test checks nothing")
	for _, name := range names {
		require.True(t, there[string(name[1])], "%s", name[1])
	}
}

// A listed is a package as go list prints it.
type listed struct {
	ImportPath string
	Module     *struct{ Path string }
	Imports    []string
}

// list returns the packages of the module that the packages of patterns need, on a system.
func list(t *testing.T, goos string, patterns ...string) map[string]listed {
	t.Helper()
	parsePackage(t) // or skip
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("no go command here:", err)
	}
	cmd := exec.Command("go", append([]string{"list", "-deps", "-json=ImportPath,Module,Imports"}, patterns...)...)
	cmd.Env = append(os.Environ(), "GOOS="+goos, "GOARCH=amd64", "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	require.NoError(t, err)
	all := map[string]listed{}
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); {
		var p listed
		require.NoError(t, d.Decode(&p))
		if p.Module != nil && p.Module.Path == module {
			all[p.ImportPath] = p
		}
	}
	return all
}

const module = "github.com/acceptq/acceptq"

// mayImport has for each package under internal/ that the root needs the packages of the
// module that it may import. A package imports only those below it, so no import leads back.
var mayImport = map[string][]string{
	"internal/unwrap":   nil,
	"internal/sys":      nil,
	"internal/tcpinfo":  {"internal/sys"},
	"internal/sockdiag": {"internal/sys"},
	"internal/endpoint": {"internal/sys"},
	"internal/netns":    {"internal/sys"},
	"internal/sockopt":  {"internal/endpoint", "internal/sys"},
	"internal/intake":   {"internal/netns", "internal/sockdiag", "internal/tcpinfo", "internal/sys"},
}

func TestImportsRunOneWay(t *testing.T) {
	for _, goos := range []string{"linux", "freebsd", "windows"} {
		all := list(t, goos, ".")
		require.Contains(t, all, module, "this test checks nothing")
		for path, p := range all {
			if path == module {
				continue
			}
			room := strings.TrimPrefix(path, module+"/")
			allowed, known := mayImport[room]
			require.True(t, known, "%s: the root needs %s, which mayImport does not have", goos, room)
			for _, imported := range p.Imports {
				if below, ours := strings.CutPrefix(imported, module+"/"); ours || imported == module {
					require.Contains(t, allowed, below, "%s: %s imports %s", goos, room, imported)
				}
			}
		}
	}
}

// A package that a program imports must not need what only tests need.
func TestOnlyTestsImportTestkit(t *testing.T) {
	for path, p := range list(t, "linux", "./...") {
		require.NotContains(t, p.Imports, module+"/internal/testkit", path)
	}
}

// A room is small enough to be understood alone: the methods of a type are in one file, or in
// one for each system and at most two others, and the package comment says in a few lines
// what the package does.
func TestRoomsAreTidy(t *testing.T) {
	for _, dir := range rooms(t) {
		methods := map[string]map[string]bool{}
		comments := 0
		for _, f := range parse(t, dir) {
			if strings.HasSuffix(f.name, "_test.go") {
				continue
			}
			if f.Doc != nil && dir != "." {
				comments++
				lines := strings.Count(f.Doc.Text(), "\n")
				require.LessOrEqual(t, lines, 10, "%s/%s: the package comment has %d lines", dir, f.name, lines)
			}
			for _, decl := range f.Decls {
				d, ok := decl.(*ast.FuncDecl)
				if !ok || d.Recv == nil {
					continue
				}
				name := receiver(d)
				if methods[name] == nil {
					methods[name] = map[string]bool{}
				}
				methods[name][f.name] = true
			}
		}
		if dir != "." {
			require.Equal(t, 1, comments, "%s: package comments", dir)
		}
		for name, in := range methods {
			if dir == "." && (name == "Listener" || name == "Shards") {
				continue // their methods are the sections of the documentation, one file each
			}
			require.LessOrEqual(t, len(in), 3, "%s: the methods of %s are in %v", dir, name, in)
		}
	}
}

func TestNoPackageStateOfFunctions(t *testing.T) {
	var files []source
	for _, dir := range rooms(t) {
		for _, f := range parse(t, dir) {
			if !strings.HasSuffix(f.name, "_test.go") {
				files = append(files, f)
			}
		}
	}
	funcTypes := map[string]bool{}
	for _, f := range files {
		ast.Inspect(f.File, func(n ast.Node) bool {
			if spec, ok := n.(*ast.TypeSpec); ok {
				_, funcTypes[spec.Name.Name] = spec.Type.(*ast.FuncType)
			}
			return true
		})
	}
	for _, f := range files {
		for _, decl := range f.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				require.False(t, d.Recv == nil && d.Name.Name == "init", "%s has an init function", f.name)
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					v, ok := spec.(*ast.ValueSpec)
					if !ok || d.Tok != token.VAR {
						continue
					}
					_, isFunc := v.Type.(*ast.FuncType)
					if name, ok := v.Type.(*ast.Ident); ok {
						isFunc = funcTypes[name.Name]
					}
					require.False(t, isFunc, "%s: %s is a variable function", f.name, v.Names[0])
					for i, value := range v.Values {
						if strings.HasPrefix(v.Names[i].Name, "Err") {
							continue // an error of another package
						}
						switch value.(type) {
						case *ast.FuncLit, *ast.SelectorExpr, *ast.Ident: // the last two may refer to a function
							t.Errorf("%s: %s may be a variable function", f.name, v.Names[0])
						}
					}
				}
			}
		}
	}
}

// With a type of x/sys in an exported declaration, the API would depend on the version
// of x/sys.
func TestExportedAPIHasNoSysTypes(t *testing.T) {
	files, _ := parsePackage(t)
	s := surface{types: map[string][]typeIn{}, methods: map[string][]funcIn{}, seen: map[string]bool{}}
	for _, f := range files {
		for _, decl := range f.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				if d.Recv != nil {
					s.methods[receiver(d)] = append(s.methods[receiver(d)], funcIn{f, d})
				}
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					if spec, ok := spec.(*ast.TypeSpec); ok {
						s.types[spec.Name.Name] = append(s.types[spec.Name.Name], typeIn{f, spec})
					}
				}
			}
		}
	}
	for _, f := range files {
		for _, decl := range f.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				if d.Recv == nil && d.Name.IsExported() {
					s.look(f, d.Type)
				}
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					switch spec := spec.(type) {
					case *ast.TypeSpec:
						if spec.Name.IsExported() {
							s.look(f, spec.Name)
						}
					case *ast.ValueSpec:
						for _, name := range spec.Names {
							if name.IsExported() {
								s.look(f, spec)
							}
						}
					}
				}
			}
		}
	}
	require.True(t, s.seen["Listener"] && s.seen["Backlog"], "this test checks nothing")
	require.Empty(t, s.found)
}

type (
	typeIn struct {
		source
		spec *ast.TypeSpec
	}
	funcIn struct {
		source
		decl *ast.FuncDecl
	}
)

// surface collects the types and methods that a user of the package can reach.
type surface struct {
	types   map[string][]typeIn // one declaration for each system
	methods map[string][]funcIn // by the type of their receiver
	seen    map[string]bool     // types already checked
	found   []string            // uses of x/sys
}

// look follows a declaration in f to everything that can be reached from it: the types
// of the package that it names, exported or not, their exported fields and methods, and
// their embedded types.
func (s *surface) look(f source, node ast.Node) {
	ast.Inspect(node, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.StructType:
			for _, field := range n.Fields.List {
				if len(field.Names) == 0 {
					s.look(f, field.Type)
				}
				for _, name := range field.Names {
					if name.IsExported() {
						s.look(f, field.Type)
					}
				}
			}
			return false
		case *ast.SelectorExpr:
			for path, name := range f.imports() {
				if pkg, ok := n.X.(*ast.Ident); ok && pkg.Name == name && strings.HasPrefix(path, "golang.org/x/sys/") {
					s.found = append(s.found, f.name+": "+name+"."+n.Sel.Name)
				}
			}
			return false
		case *ast.Ident:
			if s.seen[n.Name] || s.types[n.Name] == nil {
				return true
			}
			s.seen[n.Name] = true
			for _, t := range s.types[n.Name] {
				s.look(t.source, t.spec.Type)
			}
			for _, m := range s.methods[n.Name] {
				if m.decl.Name.IsExported() {
					s.look(m.source, m.decl.Type)
				}
			}
		}
		return true
	})
}

// receiver returns the name of the receiver type of d.
func receiver(d *ast.FuncDecl) string {
	expr := d.Recv.List[0].Type
	if star, ok := expr.(*ast.StarExpr); ok {
		expr = star.X
	}
	if name, ok := expr.(*ast.Ident); ok {
		return name.Name
	}
	return ""
}
